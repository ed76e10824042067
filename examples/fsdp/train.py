"""A transformer whose parameters, gradients and optimizer states are sharded over the ranks (torch's fully_shard).

    python train.py --devices 2 --accelerator cpu --checkpoint file:///tmp/fsdp

Each block is a shard unit; `--recompute` keeps only the blocks' inputs for the backward pass. The task is to sort: given
numbers in any order, name them from the smallest to the greatest. Runs on a laptop, under torchrun and in a TrainingRun.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import trainyard as L
from trainyard.strategies import FSDPStrategy


class Unsorted(Dataset[Any]):
    """Sequences of `length` numbers below `numbers`, a function of their place alone."""

    def __init__(self, count: int, length: int, numbers: int, offset: int = 0) -> None:
        self.count, self.length, self.numbers, self.offset = count, length, numbers, offset

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.offset + index)
        given = torch.randint(self.numbers, (self.length,), generator=generator)
        return given, given.sort().values


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.feed(self.between(x))  # type: ignore[no-any-return]


class Sorter(L.LightningModule):
    """Its layers are made in configure_model: on a cluster no rank ever holds all of them."""

    def __init__(
        self, width: int = 64, depth: int = 2, length: int = 8, numbers: int = 16, lr: float = 2e-3
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.blocks: nn.ModuleList | None = None

    def configure_model(self) -> None:
        if self.blocks is not None:
            return
        h = self.hparams
        self.embed = nn.Embedding(h.numbers, h.width)
        self.position = nn.Embedding(h.length, h.width)
        self.blocks = nn.ModuleList(Block(h.width, 4) for _ in range(h.depth))
        self.head = nn.Linear(h.width, h.numbers)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        places = torch.arange(given.shape[1], device=given.device)
        x = self.embed(given) + self.position(places)
        for block in self.blocks or ():
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        given, wanted = batch
        loss = nn.functional.cross_entropy(self(given).flatten(0, 1), wanted.flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        given, wanted = batch
        self.log("val_accuracy", (self(given).argmax(-1) == wanted).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--checkpoint", help="outside of a TrainingRun: s3://bucket/prefix or file:///folder")
    args = parser.parse_args()

    L.seed_everything(1)
    strategy = FSDPStrategy(
        auto_wrap_policy={Block}, activation_checkpointing_policy={Block} if args.recompute else None
    )
    trainer = L.Trainer(
        accelerator=args.accelerator, devices=args.devices, strategy=strategy, precision=args.precision,
        max_epochs=args.epochs, gradient_clip_val=1.0,
        checkpoint=L.CheckpointConfig(uri=args.checkpoint) if args.checkpoint else None,
    )  # fmt: skip
    model = Sorter(depth=args.depth)
    trainer.fit(
        model,
        DataLoader(Unsorted(args.samples, 8, 16), args.batch_size, shuffle=True),
        DataLoader(Unsorted(512, 8, 16, offset=1_000_000), 128),
    )
    trainer.print(f"numbers in their right place: {float(trainer.callback_metrics['val_accuracy']):.3f}")


if __name__ == "__main__":
    main()
