"""One part of a run on changing numbers of processes: `elastic_run.py OPTIONS`, as JSON; see `Options`.

Each rank appends to FOLDER/samples what it trained on: {"step", "epoch", "ids"} a batch. Rank 0 prints "RESULT " and JSON.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import trainyard as L
from trainyard.callbacks import EarlyStopping, GradientAccumulationScheduler


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: str
    steps: int = -1
    """Until which step."""
    epochs: int = 3
    resume: str = ""
    virtual: int = 0
    """0: not elastic."""
    strategy: str = "ddp"
    samples: int = 97
    batch: int = 3
    accumulate: int = 1
    schedule: bool = False
    """Accumulate 2 in the first epoch, 1 from the second on."""
    limit: int | float | None = None
    val_interval: int | float = 1.0
    drop_last: bool = False
    workers: int = 0
    sampler: bool = False
    """One of the user's, that draws."""
    precision: str = "32-true"
    batch_norm: bool = True
    noise: bool = True
    """Dropout, random transforms, generators of all kinds."""
    plain: bool = False
    """SGD, and nothing that looks at logged values."""
    engine: bool = False
    """Checkpoint as the environment says, and resume by itself."""
    delay: float = 0.0
    """Seconds for each batch."""
    uneven: bool = False
    """Parameters that only some samples use, and one that none does."""


class Numbered(Dataset[Any]):
    """Sample n knows its number; with `noise` its inputs are another each time."""

    def __init__(self, count: int, noise: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(count, 4, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        inputs = self.inputs[index]
        if self.noise:
            inputs = inputs + 0.01 * (torch.rand(4) + random.random() + float(np.random.rand()))
        return inputs.float(), self.inputs[index].sum().reshape(1), index


class Net(L.LightningModule):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.body = nn.Linear(4, 16)
        self.norm = nn.BatchNorm1d(16) if options.batch_norm else nn.Identity()
        self.dropout = nn.Dropout(0.3 if options.noise else 0.0)
        if options.uneven:
            self.rare, self.never = nn.Linear(4, 1), nn.Linear(2, 2)
        self.head = nn.Linear(16, 1)
        self.log_file = Path(options.folder, "samples")
        self.planned: int | float = 0

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = self.head(self.dropout(torch.relu(self.norm(self.body(x)))))
        if self.options.uneven and bool((ids == 7).any()):
            out = out + self.rare(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, ids = batch
        plan = self.trainer.batch_plan
        time.sleep(self.options.delay)
        if not plan.padding:
            line = {"step": self.global_step, "epoch": self.current_epoch, "ids": ids.tolist()}
            with self.log_file.open("a") as log:
                log.write(json.dumps(line) + "\n")
        noise = random.random() + float(np.random.rand()) if self.options.noise else 0.0
        loss = nn.functional.mse_loss(self(x, ids), y) * (1 + 0.01 * noise)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, ids = batch
        noise = 0.01 * torch.rand(1).item() if self.options.noise else 0.0
        self.log("val", nn.functional.mse_loss(self(x, ids), y) + noise, sync_dist=True)

    def configure_optimizers(self) -> Any:
        self.planned = self.trainer.estimated_stepping_batches
        if self.options.plain:
            return torch.optim.SGD(self.parameters(), 0.05)
        optimizer = torch.optim.AdamW(self.parameters(), 0.02)
        step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return [optimizer], [
            {"scheduler": step, "interval": "step"}, {"scheduler": plateau, "monitor": "loss"}
        ]  # fmt: skip


class Saver(L.Callback):
    """Saves in the middle of the run, as it stands: after its end the sums of an epoch that is not over are gone."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.batch_plan.steps and trainer.global_step == self.options.steps:
            trainer.save_checkpoint(f"{self.options.folder}/end.ckpt")


def main(options: Options) -> None:
    torch.set_num_threads(1)
    L.seed_everything(5)
    callbacks: list[Any] = [Saver(options)]
    if options.schedule:
        callbacks.append(GradientAccumulationScheduler({0: 2, 1: 1}))
    if not options.plain:
        callbacks.append(EarlyStopping("val", patience=20, strict=False))
    elastic = {"deterministic": "elastic", "virtual_ranks": options.virtual} if options.virtual else {}
    trainer = L.Trainer(
        accelerator="cpu", strategy=options.strategy, max_epochs=options.epochs, max_steps=options.steps,
        accumulate_grad_batches=options.accumulate, gradient_clip_val=None if options.plain else 0.5,
        limit_train_batches=options.limit, val_check_interval=options.val_interval, logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=options.engine, num_sanity_val_steps=0,
        precision=options.precision, log_every_n_steps=2, **elastic,
    )  # fmt: skip
    model = Net(options)
    data = Numbered(options.samples, options.noise)
    sampler = (
        WeightedRandomSampler([1.0] * len(data), len(data), replacement=False) if options.sampler else None
    )
    train = DataLoader(
        data, options.batch, shuffle=not options.sampler, sampler=sampler, drop_last=options.drop_last,
        num_workers=options.workers,
    )  # fmt: skip
    trainer.fit(model, train, DataLoader(data, 5), ckpt_path=options.resume or None)
    if trainer.global_step != options.steps:
        trainer.save_checkpoint(f"{options.folder}/end.ckpt")
    state = trainer.loop_state
    if trainer.is_global_zero:
        checkpoint = torch.load(f"{options.folder}/end.ckpt", weights_only=True)
        result = {
            "weights": digest(checkpoint["state_dict"]), "optimizer": digest(checkpoint["optimizer_states"]),
            "step": trainer.global_step, "epoch": trainer.current_epoch, "batches": state.batches,
            "total": state.total_batches, "planned": model.planned, "per_epoch": trainer.num_training_batches,
            "values": {k: float(v) for k, v in trainer.callback_metrics.items()},
        }  # fmt: skip
        print("RESULT", json.dumps(result), flush=True)


def digest(state: Any) -> str:
    """SHA-256 of all tensors and numbers."""
    found = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                found.update(str(key).encode())
                walk(value[key])
        elif isinstance(value, list | tuple):
            for one in value:
                walk(one)
        else:
            found.update(repr(value).encode())

    walk(state)
    return found.hexdigest()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s %(message)s")
    main(Options(**json.loads(sys.argv[1])))
