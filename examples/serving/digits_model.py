"""A small classifier of handwritten digits (scikit-learn's, 8x8 pixels) and its data, made to be trained and served.

All that happens to an image on its way to the model is in `DigitsData`, and the servers call the same methods.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainyard as L

MOST = 256
"""Images in one request."""


class DigitsData(L.LightningDataModule):
    """Images are (8, 8) integers from 0 (paper) to 16 (ink). Every fifth is held out."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.mean, self.std = 0.0, 1.0

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits  # a server needs no data set

        digits = load_digits()
        images, labels = torch.tensor(digits.images, dtype=torch.uint8), torch.tensor(digits.target)
        held_out = torch.arange(len(images)) % 5 == 0
        self.training = TensorDataset(images[~held_out], labels[~held_out])
        self.validation = TensorDataset(images[held_out], labels[held_out])
        if stage == "fit":
            ink = images[~held_out].double()
            self.mean, self.std = ink.mean().item(), ink.std().item()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.training, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.validation, self.batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.validation.tensors[0], self.batch_size)  # type: ignore[arg-type]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """(n, 8, 8) of ink to (n, 8, 8) of mean 0 and deviation 1, with or without labels."""
        if isinstance(batch, list | tuple):
            images, labels = batch
            return self.on_after_batch_transfer(images, dataloader_idx), labels
        return (batch.float() - self.mean) / self.std

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mean, self.std = state_dict["mean"], state_dict["std"]

    # What only servers call.

    def save_preprocessing(self, path: Path) -> None:
        """What a server needs of the training data: two numbers."""
        path.write_text(json.dumps(self.state_dict()))

    @classmethod
    def for_serving(cls, path: Path) -> DigitsData:
        """The data module with the preprocessing that was saved."""
        data = cls()
        data.load_state_dict(json.loads(path.read_text()))
        return data

    @staticmethod
    def parse(images: Any) -> torch.Tensor:
        """(n, 8, 8) unsigned bytes from nested lists. Raises ValueError with what is wrong with them."""
        if not isinstance(images, list) or not 1 <= len(images) <= MOST:
            raise ValueError(f"images must be a list of 1 to {MOST} images")
        for number, image in enumerate(images):
            rows = image if isinstance(image, list) else []
            if len(rows) != 8 or not all(isinstance(row, list) and len(row) == 8 for row in rows):
                raise ValueError(f"image {number} must be 8 rows of 8 pixels")
            if not all(type(ink) is int and 0 <= ink <= 16 for row in rows for ink in row):
                raise ValueError(f"image {number}: pixels must be whole numbers from 0 to 16")
        return torch.tensor(images, dtype=torch.uint8)


class DigitsClassifier(L.LightningModule):
    """(n, 8, 8) of ink of mean 0 to (n, 10) logits."""

    def __init__(self, hidden: int = 64, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.example_input_array = torch.zeros(2, 8, 8)
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(hidden, 10),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


def answers(logits: torch.Tensor) -> list[dict[str, Any]]:
    """For each image the digit, and the probability of each of the ten."""
    return [
        {"digit": int(row.argmax()), "probabilities": row.tolist()} for row in logits.softmax(dim=1).cpu()
    ]
