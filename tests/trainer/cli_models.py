"""Classes for the command line's tests to name."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import trainyard as L
from tests.trainer.models import loader

if TYPE_CHECKING:
    from trainyard.callbacks import Callback


class Activation(enum.Enum):
    RELU = "relu"
    GELU = "gelu"


@dataclass
class Sizes:
    width: int = 4
    """Of the hidden layer."""
    depth: int = 1

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError("depth is less than 1")


class Net(L.LightningModule):
    """A net.

    Args:
        lr: Learning rate.
        activation: What stands between
            the layers.
        sizes: How large it is.
    """

    def __init__(
        self, lr: float = 0.1, activation: Activation = Activation.RELU, sizes: Sizes | None = None, name: str = "net",
        loss: torch.nn.Module | None = None,
        make_optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] = torch.optim.SGD,
        tags: list[str] | None = None, mode: Literal["a", "b"] = "a", folder: Path | None = None,
        rider: Callback | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters(ignore=["loss", "make_optimizer", "rider"])
        self.net = torch.nn.Linear(4, 1)
        self.make_optimizer, self.loss, self.rider = make_optimizer, loss or torch.nn.MSELoss(), rider
        self.example_input_array = torch.zeros(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.loss(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), lr=self.hparams.lr)  # type: ignore[call-arg]


class Deep(Net):
    """Hands what it does not know to Net."""

    def __init__(self, levels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.levels = levels


class Data(L.LightningDataModule):
    """Regression."""

    def __init__(self, count: int = 16, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = 4

    def train_dataloader(self) -> Any:
        return loader(self.hparams.count, self.hparams.batch_size)

    def val_dataloader(self) -> Any:
        return loader(4)

    def test_dataloader(self) -> Any:
        return loader(4)

    def predict_dataloader(self) -> Any:
        return loader(4)
