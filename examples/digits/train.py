"""A small transformer that reads handwritten digits (scikit-learn's, 1797 images of 8x8).

The same file runs on a laptop (`python train.py --checkpoint file:///tmp/digits`), under torchrun, and in a
TrainingRun. Stop it at any moment and start it again: it goes on as if nothing had happened, to the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainyard as L


class Digits(L.LightningDataModule):
    """Every fifth image is for validation."""

    def __init__(self, batch_size: int, num_workers: int) -> None:
        self.batch_size = batch_size
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        ids = torch.arange(len(images))
        all_of_them = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels), ids
        held_out = ids % 5 == 0
        self.training = TensorDataset(*(t[~held_out] for t in all_of_them))
        self.validation = TensorDataset(*(t[held_out] for t in all_of_them))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.training, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.validation, 128)


class Reader(L.LightningModule):
    """Each of the eight rows is a token."""

    def __init__(self, hidden: int, lr: float, step_delay: float) -> None:
        super().__init__()
        self.lr, self.step_delay = lr, step_delay
        self.embed = nn.Linear(8, hidden)
        self.position = nn.Parameter(torch.randn(8, hidden) * 0.02)
        layer = nn.TransformerEncoderLayer(
            hidden, 4, 2 * hidden, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8 * hidden, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.embed(images.unflatten(1, (8, 8))) + self.position
        return self.head(self.encoder(rows).flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels, _ = batch
        time.sleep(self.step_delay)
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels, _ = batch
        logits = self(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), sync_dist=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SampleLog(L.Callback):
    """One JSON line for each batch: which samples this rank has trained on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a", buffering=1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.batch_plan.padding:
            return
        line = {
            "step": trainer.global_step + (not trainer.batch_plan.steps),
            "epoch": trainer.current_epoch,
            "rank": trainer.global_rank,
            "ids": batch[-1].tolist(),
        }
        self.file.write(json.dumps(line) + "\n")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.file.close()


class SampleAudit(L.Callback):
    """How often each sample was used on the way to the weights: counted with the checkpoint, so over all attempts."""

    def __init__(self) -> None:
        self.seen = torch.zeros(0, dtype=torch.int64)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        new = torch.zeros(len(trainer.datamodule.training), dtype=torch.int64)
        if not trainer.batch_plan.padding:
            # Ids are positions in the whole data set: make them positions among those that are trained on.
            new[torch.isin(trainer.datamodule.training.tensors[-1], batch[-1])] = 1
        if trainer.world_size > 1:
            torch.distributed.all_reduce(new)
        self.seen = new + (self.seen if len(self.seen) else 0)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]

    def verdict(self) -> str:
        """One line for people and tests."""
        least, most = int(self.seen.min()), int(self.seen.max())
        if least == most:
            return f"samples: every one of {len(self.seen)} seen exactly {least} times"
        return f"samples: NOT EXACT, seen between {least} and {most} times"


def weights_sha256(module: nn.Module) -> str:
    """Of all weights and buffers, bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--hidden", type=int, default=32, help="width of the model; a multiple of 4")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument(
        "--step-delay", type=float, default=0.0, help="pause in seconds per step, to watch failures"
    )
    parser.add_argument("--log-every", type=int, default=10, help="steps between two lines of progress")
    parser.add_argument("--sample-log", type=Path, help="folder for the ids of the samples of each step")
    parser.add_argument("--audit-samples", action="store_true", help="count how often each sample is used")
    parser.add_argument("--checkpoint", help="outside of a TrainingRun: s3://bucket/prefix or file:///folder")
    parser.add_argument(
        "--every-n-steps", type=int, default=20, help="with --checkpoint: steps between two saves"
    )
    args = parser.parse_args()

    L.seed_everything(args.seed)
    model = Reader(args.hidden, args.lr, args.step_delay)
    checkpoint = None
    if args.checkpoint:
        checkpoint = L.CheckpointConfig(uri=args.checkpoint, every_n_steps=args.every_n_steps, run="digits")
    callbacks: list[L.Callback] = [SampleLog(args.sample_log)] if args.sample_log else []
    audit = SampleAudit()
    if args.audit_samples:
        callbacks.append(audit)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        log_every_n_steps=args.log_every,
        logger=False,
        callbacks=callbacks,
        checkpoint=checkpoint,
    )
    trainer.fit(model, datamodule=Digits(args.batch_size, args.workers))
    accuracy = trainer.validation_metrics.get("val_accuracy")
    if accuracy is not None:
        trainer.print(f"validation accuracy {accuracy:.4f}")
    if args.audit_samples:
        trainer.print(audit.verdict())
    trainer.print(f"final weights sha256={weights_sha256(model)}", flush=True)


if __name__ == "__main__":
    main()
