"""A fit with the checkpoint engine: `sharded_runs.py FOLDER URI STRATEGY STEPS`, one process a rank.

Each rank leaves its findings as FOLDER/rank.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import trainyard as L
from tests.trainer.models import numbers
from tests.trainer.strategy_ranks import Block
from trainyard.strategies import FSDPStrategy, sharded_state

GLOBAL_BATCH = 12


class Net(L.LightningModule):
    """Layers that no number of ranks divides, a tied one, and a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(4, 7)
        self.body = nn.Sequential(Block(7), Block(7))
        self.head = nn.Linear(7, 7, bias=False)
        self.tied = nn.Linear(7, 7, bias=False)
        self.tied.weight = self.head.weight
        self.scale = nn.Parameter(torch.ones(7))
        self.norm = nn.BatchNorm1d(7, affine=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        self.steps += 1
        hidden = self.body(self.first(inputs))
        self.norm(hidden.detach())  # only its statistics: of this rank's batches
        out = self.tied(self.head(hidden)) * self.scale
        loss = nn.functional.mse_loss(out.mean(1, keepdim=True), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.02)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}
        ]


def strategy(name: str, world: int) -> Any:
    if name == "hybrid":
        mesh = (2, world // 2) if world % 2 == 0 else (1, world)
        return FSDPStrategy(auto_wrap_policy={Block}, sharding_strategy="HYBRID_SHARD", device_mesh=mesh)
    if name == "fsdp":
        return FSDPStrategy(auto_wrap_policy={Block}, sharding_strategy="FULL_SHARD")
    return name if world > 1 else "auto"


class Whole(L.Callback):
    """The weights at the end, however they lie."""

    def __init__(self, gathered: list[int]) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        """This rank's."""
        self.gathered = gathered
        self.before = -1
        """Tensors that were gathered until then: for all the saves."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.before = len(self.gathered)
        state = trainer.strategy.model_state(pl_module)
        self.buffers = {n: b.detach().clone() for n, b in pl_module.named_buffers()}
        self.found = {name: value.detach().clone() for name, value in state.items()}


def main(folder: str, uri: str, name: str, steps: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    gathered: list[int] = []
    whole = sharded_state.whole

    def counted(tensor: Any, **more: Any) -> Any:
        gathered.append(1)
        return whole(tensor, **more)

    sharded_state.whole = counted
    L.seed_everything(3)
    end = Whole(gathered)
    trainer = L.Trainer(
        strategy=strategy(name, world), accelerator="cpu", max_steps=int(steps), max_epochs=-1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(uri), callbacks=[end],
        checkpoint=L.CheckpointConfig(uri=uri, run="run-1", every_n_steps=2) if uri else None,
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(numbers(60), GLOBAL_BATCH // world, shuffle=True))
    found = {
        "weights": end.found,
        "buffers": end.buffers,
        "step": trainer.global_step,
        "gathered": end.before,
    }
    torch.save(found, Path(folder) / os.environ.get("RANK", "0"))


if __name__ == "__main__":
    main(*sys.argv[1:])
