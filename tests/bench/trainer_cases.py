"""One process of `./dev bench trainer`: loops of several libraries, taking turns in small pieces, so that whatever else the
machine does falls on all of them alike. Runs in the environment of locks/peers.txt, with Trainyard on its path.

    python -m tests.bench.trainer_cases steps '{"rounds": 9, "steps": 1000}'
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

FEATURES, BATCH = 32, 4


def data(steps: int) -> Any:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(torch.randn(BATCH * steps, FEATURES)), BATCH)


def network() -> Any:
    import torch

    torch.manual_seed(1)
    return torch.nn.Linear(FEATURES, 2)


# ---- loops; each returns seconds of its steps, without what comes before and after them


def raw(steps: int, wrap: Callable[[Any], Any] | None = None) -> float:
    import torch

    model = wrap(network()) if wrap else network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = data(steps)
    begin = time.perf_counter()
    for (batch,) in loader:
        loss = model(batch).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - begin


def fabric(steps: int) -> float:
    import torch
    from lightning.fabric import Fabric

    tool = Fabric(accelerator="cpu", devices=1)
    model = network()
    model, optimizer = tool.setup(model, torch.optim.SGD(model.parameters(), 0.01))
    loader = tool.setup_dataloaders(data(steps))
    begin = time.perf_counter()
    for (batch,) in loader:
        loss = model(batch).sum()
        optimizer.zero_grad()
        tool.backward(loss)
        optimizer.step()
    return time.perf_counter() - begin


def accelerate(steps: int) -> float:
    import torch
    from accelerate import Accelerator

    tool = Accelerator(cpu=True)
    model = network()
    model, optimizer, loader = tool.prepare(model, torch.optim.SGD(model.parameters(), 0.01), data(steps))
    begin = time.perf_counter()
    for (batch,) in loader:
        loss = model(batch).sum()
        optimizer.zero_grad()
        tool.backward(loss)
        optimizer.step()
    return time.perf_counter() - begin


def with_trainer(library: Any, steps: int, *, logs: int = 0, epochs: int = 1, **options: Any) -> float:
    """The same in a LightningModule. With several epochs: seconds between the last step of one and the first of the next."""
    import torch

    class Module(library.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.net(batch[0]).sum()
            for number in range(logs):
                self.log(f"value_{number}", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    class Clock(library.Callback):  # type: ignore[name-defined,misc]
        begin = end = 0.0

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if not self.begin:
                self.begin = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.end = time.perf_counter()

    class Edges(library.Callback):  # type: ignore[name-defined,misc]
        """Of epochs: when the last batch of one ended and the first of the next began."""

        def __init__(self) -> None:
            self.last, self.between = 0.0, []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and self.last:
                self.between.append(time.perf_counter() - self.last)

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.last = time.perf_counter()

    watch: Any = Clock() if epochs == 1 else Edges()
    options = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "log_every_n_steps": 1_000_000, **options,
    }  # fmt: skip
    if options.pop("bare", False):
        options = {"barebones": True}
    trainer = library.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": epochs, "callbacks": [watch]} | options
    )
    trainer.fit(Module(), data(steps))
    if epochs > 1:
        return sorted(watch.between)[len(watch.between) // 2]
    return float(watch.end - watch.begin)


def libraries() -> tuple[Any, Any]:
    """(Trainyard, Lightning)"""
    import lightning.pytorch

    import trainyard

    return trainyard, lightning.pytorch


def step_cases() -> dict[str, Callable[[int], float]]:
    ours, lightning = libraries()
    return {
        "raw loop": raw,
        "trainyard": lambda n: with_trainer(ours, n),
        "trainyard, 1 log": lambda n: with_trainer(ours, n, logs=1),
        "trainyard, 5 logs": lambda n: with_trainer(ours, n, logs=5),
        "trainyard, 5 logs, flushed every 50": lambda n: with_trainer(ours, n, logs=5, log_every_n_steps=50),
        "lightning": lambda n: with_trainer(lightning, n),
        "lightning barebones": lambda n: with_trainer(lightning, n, bare=True),
        "lightning, 1 log": lambda n: with_trainer(lightning, n, logs=1),
        "lightning, 5 logs": lambda n: with_trainer(lightning, n, logs=5),
        "fabric": fabric,
        "accelerate": accelerate,
    }


def steps(settings: dict[str, Any]) -> dict[str, list[float]]:
    """Microseconds a step, by case, one figure a round."""
    return in_turns(step_cases(), settings["rounds"], settings["steps"])


def in_turns(cases: dict[str, Callable[[int], float]], rounds: int, count: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():
        run(50)  # imports and caches
    for _ in range(rounds):
        for name, run in cases.items():
            gc.collect()
            found[name].append(run(count) / count * 1e6)
    return found


def epochs(settings: dict[str, Any]) -> dict[str, list[float]]:
    """Microseconds from the last step of an epoch to the first of the next."""
    ours, lightning = libraries()
    cases = {
        "raw loop": raw_between,
        "trainyard": lambda n: with_trainer(ours, 5, epochs=n),
        "lightning": lambda n: with_trainer(lightning, 5, epochs=n),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(settings["rounds"]):
        for name, run in cases.items():
            found[name].append(run(30) * 1e6)
    return found


def raw_between(count: int) -> float:
    import torch

    model, loader = network(), data(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    between, last = [], 0.0
    for _ in range(count):
        for number, (batch,) in enumerate(loader):
            if number == 0 and last:
                between.append(time.perf_counter() - last)
            loss = model(batch).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = time.perf_counter()
    return sorted(between)[len(between) // 2]


def memory(settings: dict[str, Any]) -> dict[str, list[float]]:
    """MiB of resident memory of a process that has trained 200 steps with `settings["case"]`."""
    run: Callable[[int], float]
    if settings["case"] == "raw loop":
        run = raw
    elif settings["case"] == "trainyard":
        import trainyard

        run = lambda n: with_trainer(trainyard, n)  # noqa: E731
    else:
        import lightning.pytorch

        run = lambda n: with_trainer(lightning.pytorch, n)  # noqa: E731
    run(200)
    with open("/proc/self/status") as file:  # noqa: PTH123
        line = next(line for line in file if line.startswith("VmRSS"))
    return {settings["case"]: [int(line.split()[1]) / 1024]}


def ranks(settings: dict[str, Any]) -> dict[str, list[float]]:
    """Microseconds a step of two ranks under torchrun, taking turns; rank 0's."""
    import torch
    import torch.distributed as dist

    ours, lightning = libraries()
    torch.set_num_threads(1)

    def ddp(count: int) -> float:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return raw(count, torch.nn.parallel.DistributedDataParallel)

    def fit(library: Any, logs: int, **options: Any) -> Callable[[int], float]:
        def run(count: int) -> float:
            return with_trainer(library, count * 2, logs=logs, strategy="ddp", devices=2, **options)

        return run

    cases = {
        "raw DDP": ddp,
        "trainyard": fit(ours, 0),
        "trainyard, 1 log": fit(ours, 1),
        "lightning": fit(lightning, 0),
        "lightning, 1 log": fit(lightning, 1),
    }
    return in_turns(cases, settings["rounds"], settings["steps"])


def main(argv: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
    what = {"steps": steps, "epochs": epochs, "memory": memory, "ranks": ranks}[argv[0]]
    with contextlib.redirect_stdout(sys.stderr):
        found = what(json.loads(argv[1]))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(found), flush=True)
    sys.stdout.flush()
    os._exit(0)  # what libraries leave running is none of our business


if __name__ == "__main__":
    main(sys.argv[1:])
