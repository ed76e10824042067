"""A program for two ranks: in each scene a fit is stopped by SIGTERM somewhere, and resumed by another Trainer.

The ranks live through all scenes, because importing torch takes longer than any of them. Rank 0 writes what it saw to the
file that the first argument names: a JSON object by scene.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import trainyard as L
from trainyard.failure import SIGTERMException
from trainyard_api.checkpoints import commits_newest_first

SAMPLES, BATCH, ACCUMULATE, EPOCHS = 48, 2, 2, 2
STEPS = EPOCHS * SAMPLES // (BATCH * 2 * ACCUMULATE)
SCENES: dict[str, tuple[str, int, int]] = {
    # name: (moment, rank, how often the moment is let pass)
    "training, rank 0": ("training_step", 0, 6),
    "training, rank 1": ("training_step", 1, 7),
    "in the middle of an accumulation": ("accumulating", 1, 2),
    "first batch": ("training_step", 1, 0),
    "last batch": ("training_step", 0, 23),
    "last batch of an epoch": ("training_step", 1, 11),
    "validation, rank 0": ("validation_step", 0, 5),
    "validation, rank 1": ("validation_step", 1, 4),
    "validation at an epoch's end": ("validation_step", 1, 12),
    "long validation": ("long validation", 0, 4),
    "long validation at an epoch's end": ("long validation", 1, 13),
    "last validation, and the resume at its end": ("long validation", 0, 16),
    "validation, last hook": ("on_validation_epoch_end", 1, 2),
    "epoch's end": ("on_train_epoch_end", 0, 0),
    "saving": ("on_save_checkpoint", 1, 1),
    "waiting for a loader": ("loader", 1, 20),
    "waiting for the other rank": ("peer waits", 1, 5),
    "both ranks": ("both", 1, 8),
    "twice": ("twice", 1, 8),
    "sanity check": ("sanity", 1, 0),
    "start": ("on_train_start", 0, 0),
}


AGAIN = "last validation, and the resume at its end"
"""Here the second fit is stopped as well, when all is done, and a third one has nothing left to do."""


class Moment:
    """Sends SIGTERM once, when the moment has come."""

    def __init__(self, name: str = "", rank: int = 0, passes: int = 0) -> None:
        self.name, self.rank, self.left = name, rank, passes
        self.pids: list[int] = []

    def __call__(self, name: str, rank: int) -> None:
        if name != self.name or rank != self.rank:
            return
        self.left -= 1
        if self.left == -1:
            self.act()

    def act(self) -> None:
        if self.name == "peer waits":
            os.kill(self.pids[0], signal.SIGTERM)
            time.sleep(0.3)  # rank 0 is in a collective meanwhile, where no Python handler runs
            return
        targets = self.pids if self.name == "both" else [os.getpid()]
        for pid in targets * (2 if self.name == "twice" else 1):
            os.kill(pid, signal.SIGTERM)


class Numbers(Dataset[Any]):
    """With noise on the samples: a batch that is loaded once too often shows."""

    def __init__(self, moment: Moment | None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(SAMPLES, 4, generator=generator)
        self.moment, self.parent = moment, os.getpid()
        self.loaded = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        self.loaded += 1
        if self.moment is not None and self.loaded == self.moment.left:
            os.kill(self.parent, signal.SIGTERM)
            time.sleep(0.3)  # the parent waits for the batch meanwhile
        sample = self.inputs[index] + 0.1 * torch.rand(4)
        return sample, sample.sum(0, keepdim=True)


class Module(L.LightningModule):
    def __init__(self, moment: Moment) -> None:
        super().__init__()
        self.moment = moment
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        self.metric_sum = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.moment("training_step", self.global_rank)
        self.moment("peer waits", self.global_rank)
        self.moment("both", self.global_rank)
        self.moment("twice", self.global_rank)
        if batch_idx % ACCUMULATE == 0:
            self.moment("accumulating", self.global_rank)
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.moment("sanity" if self.trainer.sanity_checking else "validation_step", self.global_rank)
        if not self.trainer.sanity_checking and self.moment.name == "long validation":
            self.stay()
        self.log("noise", torch.rand(()), sync_dist=True)

    def stay(self) -> None:
        """Both ranks, until they know that they are to stop."""
        self.moment.left -= 1
        if self.moment.left != -1:
            return
        if self.global_rank == self.moment.rank:
            self.moment.act()
        end = time.monotonic() + 20
        while not self.trainer.stop.armed:
            assert time.monotonic() < end
            time.sleep(0.001)

    def on_validation_epoch_end(self) -> None:
        self.moment("on_validation_epoch_end", self.global_rank)

    def on_train_epoch_end(self) -> None:
        self.moment("on_train_epoch_end", self.global_rank)

    def on_train_end(self) -> None:
        self.moment("on_train_end", self.global_rank)

    def on_train_start(self) -> None:
        self.moment("on_train_start", self.global_rank)

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        self.moment("on_save_checkpoint", self.global_rank)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Steps(L.Callback):
    """The optimizer's steps that were done, and in how many validations a metric came out."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.validations = 0
        self.errors: list[str] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.done.append(trainer.global_step + 1)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validations += not trainer.sanity_checking

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.errors.append(type(exception).__name__)


def loader(moment: Moment | None = None, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(
        Numbers(moment), BATCH, shuffle=True, num_workers=workers, prefetch_factor=2 if workers else None
    )


def fit(folder: Path, run: str, moment: Moment, workers: int = 0) -> dict[str, Any]:
    """One fit of this rank, to its end or its stop."""
    L.seed_everything(1, verbose=False)
    steps, module = Steps(), Module(moment)
    trainer = L.Trainer(
        accelerator="cpu", strategy="ddp", max_epochs=EPOCHS, accumulate_grad_batches=ACCUMULATE, callbacks=[steps],
        logger=False, enable_progress_bar=False, enable_model_summary=False, val_check_interval=4, limit_val_batches=3,
        checkpoint=L.CheckpointConfig(uri=folder.as_uri(), every_n_steps=5, run=run),
    )  # fmt: skip
    hurt = moment if moment.name == "loader" and trainer.global_rank == moment.rank else None
    stopped, error = False, ""
    try:
        trainer.fit(module, loader(hurt, workers), DataLoader(Numbers(None), BATCH))
    except SIGTERMException as stop:
        stopped, error = stop.code == 143, str(stop.args[0])
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return {
        "stopped": stopped, "error": error, "step": trainer.global_step, "done": steps.done, "errors": steps.errors,
        "validations": steps.validations, "weights": digest.hexdigest(), "next": torch.rand(()).item(),
    }  # fmt: skip


def newest(folder: Path, run: str) -> int:
    """Step of the newest commit, -1 without one."""
    from trainyard.checkpoint.commitlog import CommitLog
    from trainyard.checkpoint.stores import open_store

    store = open_store(L.CheckpointConfig(uri=folder.as_uri(), run=run))
    commits = commits_newest_first(CommitLog(store, run).refresh())
    return commits[0].step if commits else -1


def main() -> None:
    import torch.distributed as dist

    output, folder = Path(sys.argv[1]), Path(sys.argv[2])
    found: dict[str, Any] = {
        "unbroken": fit(folder, "unbroken", Moment()),
        "unbroken, 1 worker": fit(folder, "unbroken-worker", Moment(), workers=1),
    }
    pids: list[int] = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    for number, (name, (moment, rank, passes)) in enumerate(SCENES.items()):
        planned = Moment(moment, rank, passes)
        planned.pids = pids
        scene: dict[str, Any] = {}
        again = [("again", Moment("on_train_end", 1, 0))] if name == AGAIN else []
        for part, what in [("first", planned), *again, ("second", Moment())]:
            both: list[Any] = [None, None]
            mine = fit(folder, f"scene-{number}", what, workers=int(moment == "loader"))
            dist.all_gather_object(both, mine)
            scene[part] = both
            scene[f"{part} commit"] = newest(folder, f"scene-{number}")
        found[name] = scene
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
