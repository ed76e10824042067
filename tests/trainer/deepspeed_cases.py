"""What the ranks of test_deepspeed.py do, in an environment with deepspeed: `deepspeed_cases.py CASE FOLDER`."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trainyard as L
from tests.trainer.models import numbers
from tests.trainer.strategy_ranks import Net, connected, prepared, share, train, whole_run
from trainyard.callbacks import Callback, LearningRateMonitor
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.errors import MisconfigurationException
from trainyard.loggers import CSVLogger
from trainyard.strategies import DDPStrategy, DeepSpeedStrategy
from trainyard.tuner import Tuner

SMALL = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
STAGES = (1, 2, 3)


def stage(number: int, **more: Any) -> DeepSpeedStrategy:
    return DeepSpeedStrategy(stage=number, **SMALL, **more)


# ---- the strategy by itself


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"steps": 4},
    "clip, accumulate, validate": {"steps": 3, "accumulate": 2, "clip": (0.1, "norm"), "validate": True},
}


def numbers_of_stages() -> dict[str, Any]:
    found = {f"ddp {name}": whole_run(DDPStrategy(), **options) for name, options in OPTIONS.items()}
    for number in STAGES:
        for name, options in OPTIONS.items():
            found[f"{number} {name}"] = whole_run(stage(number), **options)
    found["ddp batch norm"] = whole_run("ddp", steps=2, batch_norm=True)
    for number in STAGES:
        found[f"{number} batch norm"] = whole_run(stage(number), steps=2, batch_norm=True)
    found["2 offload plain"] = whole_run(stage(2, offload_optimizer=True), steps=4)
    found["3 offload plain"] = whole_run(stage(3, offload_optimizer=True, offload_parameters=True), steps=4)
    return found


def precisions() -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed wants a processor that is fast with float16; torch computes with it on every one.
    get_accelerator().is_fp16_supported = lambda: True
    found: dict[str, Any] = {}
    for number in STAGES:
        for name in ("bf16-mixed", "bf16-true", "16-mixed"):
            strategy = stage(number, initial_scale_power=5, hysteresis=1)
            found[f"{number} {name}"] = whole_run(strategy, precision=name, clip=(0.1, "norm"))
        found[f"{number} scaler"] = scaler(number)
    return found


def scaler(number: int) -> list[Any]:
    """The loss scale before, and after a step with a gradient that does not fit into float16; whether weights moved."""
    strategy = connected(stage(number, initial_scale_power=5, hysteresis=1), "16-mixed")
    module = Net()
    optimizer = prepared(strategy, module)
    train(strategy, module, optimizer, range(1))
    kept, before = strategy.precision.state_dict(), copy.deepcopy(strategy.model_state(module))

    def closure() -> torch.Tensor:
        loss = strategy.step(module, "training_step")(strategy.precision.convert_input(share(strategy, 1)), 1)
        strategy.backward(module, loss * 1e6)
        return loss

    strategy.optimizer_step(optimizer, closure)
    after = strategy.model_state(module)
    same = all(torch.equal(after[name], before[name]) for name in after if name != "steps")
    halved = strategy.precision.state_dict()
    strategy.precision.load_state_dict(kept)
    return [kept["scale"], halved["scale"], same, strategy.precision.state_dict() == kept]


class TwoGroups(Net):
    def configure_model(self) -> None:
        super().configure_model()
        self.body[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        # Not by their shapes: with stage 3 parameters that configure_model has made are in parts by now.
        decayed = [p for name, p in self.named_parameters() if "weight" in name]
        others = [p for name, p in self.named_parameters() if "weight" not in name]
        return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others}], 0.05)


def groups_run(strategy: Any, kind: type[Net], optimizer: Callable[..., Any] | None = None) -> dict[str, Any]:
    strategy = connected(strategy)
    module = kind()
    if optimizer is not None:
        module.configure_optimizers = lambda: optimizer(module.parameters())  # type: ignore[method-assign]
    made = prepared(strategy, module)
    train(strategy, module, made, range(3))
    return {"model": strategy.model_state(module), "optimizer": strategy.optimizer_state(module, made)}


def optimizers() -> dict[str, Any]:
    found = {}
    kinds = {
        "groups": (TwoGroups, None),
        "momentum": (Net, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True)),
        "adagrad": (Net, lambda p: torch.optim.Adagrad(p, 0.05)),
    }
    for name, (kind, optimizer) in kinds.items():
        found[f"ddp {name}"] = groups_run(DDPStrategy(), kind, optimizer)
        for number in STAGES:
            found[f"{number} {name}"] = groups_run(stage(number), kind, optimizer)
    return found


def manual() -> dict[str, Any]:
    return {"ddp": manual_fit("ddp"), "1": manual_fit(stage(1)), "2": manual_fit(stage(2))}


def refusals() -> dict[str, str]:
    said = {}

    def refused(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except MisconfigurationException as error:
            said[name] = str(error)

    refused("two", lambda: stage(2).setup_optimizers(Net(), [None, None]))  # type: ignore[list-item]
    refused("manual, stage 3", lambda: manual_fit(stage(3)))
    refused("value", lambda: whole_run(stage(1), steps=1, clip=(0.1, "value")))
    refused("lbfgs", lambda: groups_run(stage(1), Net, torch.optim.LBFGS))
    refused("double", lambda: whole_run(stage(2), steps=1, precision="64-true"))
    refused("ddp", lambda: DeepSpeedStrategy(zero_optimization=False))
    refused("lr_find", lambda: tuned(stage(1)))
    refused("nvme", groups_run_on_disk)
    return said


def groups_run_on_disk() -> None:
    strategy = stage(2)
    strategy.config["zero_optimization"]["offload_optimizer"] = {"device": "nvme"}
    strategy._groups = object()  # type: ignore[assignment]
    strategy.optimizer_state(Net(), None)  # type: ignore[arg-type]


# ---- with the Trainer


class Fitted(L.LightningModule):
    """Dropout, a scheduler, logged values; 7 batches of each rank do not make whole windows of 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs) + self.bias, targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return {"loss": loss, "other": loss.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]) + self.bias

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class ManualFitted(Fitted):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def trainer(strategy: Any, folder: Path | None = None, **more: Any) -> L.Trainer:
    L.seed_everything(11, verbose=False)
    logs = folder is not None and "checkpoint" not in more
    return L.Trainer(
        strategy=strategy, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        logger=CSVLogger(folder, name="logs") if logs else False, log_every_n_steps=1,
        callbacks=[*more.pop("callbacks", []), *([LearningRateMonitor()] if logs else [])],
        enable_checkpointing="checkpoint" in more, **{"max_epochs": 4, "num_sanity_val_steps": 1, **more},
    )  # fmt: skip


ACCUMULATING = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}


def data(count: int = 28) -> Any:
    return torch.utils.data.DataLoader(numbers(count), 2, shuffle=True)


def fit(strategy: Any, folder: Path | None = None, path: str | None = None, **more: Any) -> dict[str, Any]:
    made, module = trainer(strategy, folder, **{**ACCUMULATING, **more}), Fitted()
    made.fit(module, data(), torch.utils.data.DataLoader(numbers(9), 2), ckpt_path=path)
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "metrics": {n: float(value) for n, value in made.callback_metrics.items() if not n.startswith("lr-")},
        "steps": made.global_step, "trainer": made, "module": module,
    }  # fmt: skip


def plain(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("weights", "metrics", "steps")}


def manual_fit(strategy: Any) -> dict[str, Any]:
    made, module = trainer(strategy, max_epochs=1), ManualFitted()
    made.fit(module, data())
    return {"weights": module.state_dict(), "steps": made.global_step}


class Tuned(Fitted):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.01

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.lr)


def tuned(strategy: Any) -> None:
    Tuner(trainer(strategy, max_epochs=1)).lr_find(Tuned(), data(), num_training=12)


class SaveAt(Callback):
    """In the middle of an epoch."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer.accumulating and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Killed(Callback):
    """Something is committed at step 5, the save of step 6 may be on its way, and it ends in the middle of step 7."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 5 and not trainer.accumulating:
            trainer.finish_checkpoints()
        if trainer.global_step == 6 and trainer.accumulating:
            trainer.strategy.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def engine_config(folder: Path, number: int) -> CheckpointConfig:
    return CheckpointConfig(uri=f"file://{folder}/engine", run=f"stage-{number}", every_n_steps=3)


def fits(folder: Path) -> dict[str, Any]:
    """A whole run of each stage, that leaves a file in the middle; evaluation; a second fit."""
    found = {"ddp": plain(fit("ddp", folder / "ddp"))}
    for number in STAGES:
        saver = SaveAt(6, folder / f"stage-{number}.ckpt")
        run = fit(stage(number), folder / str(number), callbacks=[saver])
        found[str(number)] = plain(run)
        found[f"{number} kinds"] = {type(p).__name__ for p in run["module"].parameters()} | {
            type(part._parameters).__name__ for part in run["module"].modules()
        }
        loader = torch.utils.data.DataLoader(numbers(6), 3)
        found[f"{number} after"] = run["trainer"].validate(run["module"], loader, verbose=False)
        guesses = run["trainer"].predict(run["module"], loader)
        found[f"{number} predicted"] = torch.cat(guesses)
        fresh = trainer(stage(number))
        found[f"{number} from the file"] = fresh.validate(
            Fitted(), loader, ckpt_path=str(folder / f"stage-{number}.ckpt"), verbose=False, weights_only=True
        )
        found[f"{number} again"] = plain(fit(stage(number)))
    return found


def killed(folder: Path) -> None:
    """Not one rank comes out of it."""
    number = int(os.environ["STAGE"])
    fit(stage(number), checkpoint=engine_config(folder, number), callbacks=[Killed()])


def resumed(folder: Path) -> dict[str, Any]:
    """In new processes: from files of the same stage, of another stage, into ddp, and from the engine's shards."""
    found = {}
    for number in STAGES:
        path = str(folder / f"stage-{number}.ckpt")
        found[f"{number} in {number}"] = plain(fit(stage(number), path=path))
        other = number % 3 + 1
        found[f"{number} in {other}"] = plain(fit(stage(other), path=path))
    found["3 in ddp"] = plain(fit("ddp", path=str(folder / "stage-3.ckpt")))
    number = int(os.environ["STAGE"])
    run = fit(stage(number), checkpoint=engine_config(folder, number))
    found["engine"] = plain(run)
    return found


def alone(folder: Path) -> dict[str, Any]:
    """One process takes up what two have left."""
    strategy = connected(stage(3))
    module = Net()
    optimizer = prepared(strategy, module, seed=99)
    whole = torch.load(folder / "whole", weights_only=True)
    strategy.load_model_state(module, whole["model"])
    strategy.load_optimizer_state(module, optimizer, whole["optimizer"])
    found = copy.deepcopy(
        {"model": strategy.model_state(module), "optimizer": strategy.optimizer_state(module, optimizer)}
    )
    train(strategy, module, optimizer, range(4, 5))
    reference = connected("ddp")
    twin = Net()
    its = prepared(reference, twin, seed=99)
    reference.load_model_state(twin, whole["model"])
    reference.load_optimizer_state(twin, its, whole["optimizer"])
    train(reference, twin, its, range(4, 5))
    trained = strategy.model_state(module)
    strategy.load_optimizer_state(module, optimizer, {**whole["optimizer"], "state": {}})
    emptied = strategy.optimizer_state(module, optimizer)["state"]
    return {"loaded": found, "ddp": reference.model_state(twin), "3": trained, "emptied": emptied}


def first(folder: Path) -> dict[str, Any]:
    """All that one pair of processes can do: they take long to start."""
    found = {
        "numbers": numbers_of_stages(), "precisions": precisions(), "optimizers": optimizers(), "manual": manual(),
        "refusals": refusals(), "fits": fits(folder),
    }  # fmt: skip
    if os.environ["RANK"] == "0":
        torch.save({k: found["numbers"]["3 plain"][k] for k in ("model", "optimizer")}, folder / "whole")
    return found


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    found = globals()[case](folder)
    torch.save(found, folder / f"{case}-{os.environ['RANK']}")
    sys.stdout.flush()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Strategies of this process would each tidy up the same process group.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
