"""A small character-level transformer that learns to write like `coriolanus.txt`, the opening of Shakespeare's play
(public domain). Runs on a laptop, under torchrun and in a TrainingRun, like `../digits/train.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainyard as L


class Characters(L.LightningDataModule):
    """The text in windows; every tenth is for validation."""

    def __init__(self, text: str, window: int, batch_size: int, num_workers: int) -> None:
        self.batch_size, self.num_workers = batch_size, num_workers
        self.alphabet = sorted(set(text))
        place = {c: i for i, c in enumerate(self.alphabet)}
        codes = torch.tensor([place[c] for c in text])
        count = (len(codes) - 1) // window
        inputs = codes[: count * window].view(count, window)
        targets = codes[1 : count * window + 1].view(count, window)
        ids = torch.arange(count)
        held_out = ids % 10 == 0
        self.training = TensorDataset(inputs[~held_out], targets[~held_out], ids[~held_out])
        self.validation = TensorDataset(inputs[held_out], targets[held_out], ids[held_out])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.training, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.validation, 64)


class Writer(L.LightningModule):
    """A decoder: each character sees those before it."""

    def __init__(self, letters: int, window: int, hidden: int, lr: float, step_delay: float) -> None:
        super().__init__()
        self.lr, self.step_delay, self.window = lr, step_delay, window
        self.embed = nn.Embedding(letters, hidden)
        self.position = nn.Parameter(torch.randn(window, hidden) * 0.02)
        layer = nn.TransformerEncoderLayer(
            hidden, 4, 4 * hidden, dropout=0.1, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(hidden, letters)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        length = codes.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=codes.device)
        return self.head(self.blocks(self.embed(codes) + self.position[:length], mask=mask, is_causal=True))

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets, _ = batch
        return nn.functional.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(self.step_delay)
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)

    @torch.no_grad()
    def write(self, codes: torch.Tensor, length: int) -> torch.Tensor:
        """`codes` (one row) continued by `length` characters."""
        self.eval()
        for _ in range(length):
            logits = self(codes[:, -self.window :])[:, -1]
            codes = torch.cat([codes, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        return codes


class SampleLog(L.Callback):
    """One JSON line for each batch: which windows this rank has trained on."""

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


def weights_sha256(module: nn.Module) -> str:
    """Of all weights and buffers, bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("coriolanus.txt"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="per process")
    parser.add_argument("--hidden", type=int, default=64, help="width of the model; a multiple of 4")
    parser.add_argument("--window", type=int, default=64, help="characters that the model sees")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument(
        "--step-delay", type=float, default=0.0, help="pause in seconds per step, to watch failures"
    )
    parser.add_argument("--sample-log", type=Path, help="folder for the ids of the windows of each step")
    parser.add_argument("--checkpoint", help="outside of a TrainingRun: s3://bucket/prefix or file:///folder")
    parser.add_argument(
        "--every-n-steps", type=int, default=20, help="with --checkpoint: steps between two saves"
    )
    args = parser.parse_args()

    L.seed_everything(args.seed)
    data = Characters(args.text.read_text(), args.window, args.batch_size, args.workers)
    model = Writer(len(data.alphabet), args.window, args.hidden, args.lr, args.step_delay)
    checkpoint = None
    if args.checkpoint:
        checkpoint = L.CheckpointConfig(uri=args.checkpoint, every_n_steps=args.every_n_steps, run="textgen")
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=False,
        callbacks=[SampleLog(args.sample_log)] if args.sample_log else [],
        checkpoint=checkpoint,
    )
    trainer.fit(model, datamodule=data)
    trainer.print(f"final weights sha256={weights_sha256(model)}", flush=True)
    if trainer.is_global_zero:
        start = torch.tensor([[data.alphabet.index(c) for c in "\n"]], device=model.device)
        print("".join(data.alphabet[i] for i in model.write(start, 300)[0].tolist()))


if __name__ == "__main__":
    main()
