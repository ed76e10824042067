"""A backbone that has learnt the digits 0 to 4, fine-tuned to tell 5 to 9: frozen at first, then at a tenth of the rate.

    python train.py --checkpoint file:///tmp/finetune

The backbone comes from a checkpoint file (`--backbone`, made by this script if it is not there). Runs on a laptop, under
torchrun and in a TrainingRun; a run that is killed goes on with the backbone frozen, or thawed, as it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainyard as L
from trainyard.callbacks import BackboneFinetuning, EarlyStopping, LearningRateMonitor, ModelCheckpoint


class Halves(L.LightningDataModule):
    """The digits 0 to 4, or 5 to 9; every fifth image is for validation."""

    def __init__(self, first: bool, batch_size: int = 32) -> None:
        super().__init__()
        self.first, self.batch_size = first, batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        chosen = labels < 5 if self.first else labels >= 5
        inputs = torch.tensor(images[chosen], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        targets = torch.tensor(labels[chosen]) % 5
        held_out = torch.arange(len(inputs)) % 5 == 0
        self.training = TensorDataset(inputs[~held_out], targets[~held_out])
        self.validation = TensorDataset(inputs[held_out], targets[held_out])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.training, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.validation, 128)


class Classifier(L.LightningModule):
    """`backbone` is what BackboneFinetuning looks for."""

    def __init__(self, channels: int = 16, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.backbone = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2), nn.BatchNorm2d(2 * channels), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(2 * channels, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), sync_dist=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Of what learns now; BackboneFinetuning adds a group for the backbone when it thaws.
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


def pretrained(path: Path, epochs: int) -> Classifier:
    """From the file; trained, and put there, if it is not."""
    if not path.exists():
        best = ModelCheckpoint(
            path.parent, path.stem, monitor="val_accuracy", mode="max", enable_version_counter=False
        )
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=[best],
            logger=False,
            accelerator="cpu",
            devices=1,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), datamodule=Halves(first=True))
    return Classifier.load_from_checkpoint(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--thaw", type=int, default=4, help="epoch at which the backbone begins to learn")
    parser.add_argument("--backbone", type=Path, default=Path("backbone.ckpt"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint", help="outside of a TrainingRun: s3://bucket/prefix or file:///folder")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    model = pretrained(args.backbone, epochs=8)
    L.seed_everything(
        args.seed, verbose=False
    )  # the same start whether or not the backbone had to be trained
    model.head.reset_parameters()
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[
            BackboneFinetuning(
                args.thaw, lambda_func=lambda _: 1.2, backbone_initial_ratio_lr=0.1, train_bn=False
            ),
            EarlyStopping("val_loss", patience=6),
            LearningRateMonitor("epoch"),
        ],
        checkpoint=L.CheckpointConfig(uri=args.checkpoint) if args.checkpoint else None,
        strategy="ddp_find_unused_parameters_true",
    )
    trainer.fit(model, datamodule=Halves(first=False))
    accuracy = trainer.callback_metrics["val_accuracy"]
    trainer.print(f"accuracy on digits that the backbone had never seen: {float(accuracy):.3f}")


if __name__ == "__main__":
    main()
