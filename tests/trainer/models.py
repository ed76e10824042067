"""Small modules and data for the library's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import trainyard as L


def numbers(count: int, features: int = 4) -> TensorDataset:
    """The same random regression problem each time."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, features, generator=generator)
    return TensorDataset(
        inputs, inputs.sum(1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=generator)
    )


def loader(count: int = 12, batch_size: int = 4, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(numbers(count), batch_size, **kwargs)


class Regression(L.LightningModule):
    """A linear model under SGD."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Linear(4, 1)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, generator=generator)

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def trainer(**kwargs: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": "checkpoint" in kwargs,
            "max_epochs": 1,
            "accelerator": "cpu",
        }
        | kwargs
    )
