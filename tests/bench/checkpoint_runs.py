"""Whole runs of our Trainer: what saves cost in one, at given steps and at the automatic interval; and how long it takes
to go on after a restart."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.bench import checkpoint_states as states


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """With `warm`: a save at each step but the last, each seen through before the next step, as `checkpoint_cases.stall` does.
    With `seconds`: a run of that length at the automatic interval."""
    import torch

    from tests.bench.checkpoint_cases import Steps, places, settle
    from trainyard import Callback, LightningModule, Trainer
    from trainyard.checkpoint.config import CheckpointConfig
    from trainyard.checkpoint.engine import Checkpointer

    torch.set_num_threads(1)
    steps = Steps()
    stalls: list[float] = []
    _timed(Checkpointer, "save", lambda seconds, saved: stalls.append(seconds) if saved else None)
    auto = "seconds" in settings
    config = CheckpointConfig(
        uri=places(settings).uri, run="train", keep=2, auto=auto, every_n_steps=None if auto else 1
    )

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = states.model(settings["bytes"])
            states.fill(self.net)
            self.tiny = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            steps.take()
            return self.tiny.sum()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW([*self.net.parameters()], lr=1e-4)
            states.fill_optimizer(optimizer)
            optimizer.add_param_group({"params": [self.tiny]})
            return optimizer

    saves: list[dict[str, float]] = []

    class EachStep(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if stalls:  # it has just been staged
                engine, step = trainer.checkpointer, trainer.global_step
                begin = time.perf_counter()

                def done() -> bool:
                    engine.due(step, epoch_end=False)
                    return bool(engine.committed_step == step)

                slower = steps.until(done)
                stall = stalls.pop()
                saves.append({
                    "stall": stall, "slower": slower, "whole": stall + time.perf_counter() - begin,
                })  # fmt: skip
            trainer.checkpointer._staging._settle()
            settle()

    found: dict[str, Any] = {}

    class ForSeconds(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.begin = time.perf_counter()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seconds = time.perf_counter() - self.begin
            if seconds >= settings["seconds"] and not found:
                engine = trainer.checkpointer
                found.update(
                    seconds=seconds, stalls=list(stalls), steps=trainer.global_step, skipped=engine.skipped,
                    interval=engine.triggers._time.seconds,
                )  # fmt: skip
                trainer.should_stop = True

    last = 1 << 30 if auto else settings["warm"] + 2
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=last, max_epochs=-1, logger=False, checkpoint=config,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[ForSeconds() if auto else EachStep()],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1000, 1))))
    return found if auto else {"saves": saves, "step": steps.usual}


def resume(settings: dict[str, Any]) -> dict[str, Any]:
    """`fresh`: train a step, commit it, end. Else: go on from there; seconds until the first batch, and of that for the
    engine's part; ends at once when that is known, on all ranks."""
    import torch

    from tests.bench.checkpoint_cases import places
    from trainyard import Callback, LightningModule, Trainer
    from trainyard.checkpoint.config import CheckpointConfig
    from trainyard.checkpoint.engine import Checkpointer

    torch.set_num_threads(1)
    fresh = settings["fresh"]
    times: dict[str, float] = {}
    read: dict[str, int] = {}
    _timed(Checkpointer, "open", lambda seconds, _: times.update(open=seconds))
    _timed(
        Checkpointer,
        "load",
        lambda seconds, loaded: (times.update(load=seconds), read.update(loaded.bytes_read)),
    )

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = states.model(settings["bytes"])
            for parameter in self.net.parameters():
                parameter.data.zero_()
            if fresh:
                states.fill(self.net)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return sum(p.sum() for p in self.net.parameters()) * 1e-6

        def configure_optimizers(self) -> Any:
            # A step that changes nothing but the moments: so what was loaded can be told.
            return torch.optim.AdamW(self.parameters(), lr=0.0)

    class Go(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if fresh:
                return
            times["first batch"] = time.perf_counter() - begin
            right = trainer.global_step == 1 and states.is_filled(pl_module.net)
            everybody = trainer.strategy.peers.gather({"right": right, "times": times, "read": read})
            if trainer.is_global_zero:
                told = {
                    "times": times,
                    "read": [e["read"] for e in everybody],
                    "right": all(e["right"] for e in everybody),
                }
                print(json.dumps(told), file=sys.__stdout__, flush=True)
            trainer.strategy.peers.gather(0)
            os._exit(0)

    config = CheckpointConfig(
        uri=places(settings).uri, run="resume", every_n_steps=1 << 30, local=settings["local"], attempt=settings["attempt"],
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=settings["ranks"], strategy=settings["strategy"], max_steps=1 if fresh else 2,
        max_epochs=-1, logger=False, checkpoint=config, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Go()],
    )  # fmt: skip
    module = Module()
    begin = time.perf_counter()
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8, 1))))
    if not fresh:
        raise RuntimeError("the run that should go on was over")
    return {"times": times}


def _timed(owner: type, name: str, saw: Callable[[float, Any], Any]) -> None:
    """Tell `saw` how long each call of a method took, and what it returned."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        value = original(*args, **options)
        saw(time.perf_counter() - begin, value)
        return value

    setattr(owner, name, timed)
