"""Fits that are broken off and go on, for the tests of callbacks: in one process, so that they are quick."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import trainyard as L
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks import Callback


class Broken(BaseException):
    """What a kill looks like to a test: nothing of the fit's own handling is to mistake it for an error of the user."""


class Settled(Callback):
    """Each save is committed before the next is due, on a slow machine too: it is known what is gone on from."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        end = time.monotonic() + 30
        while trainer.checkpointer is not None and trainer.checkpointer.in_flight:
            assert time.monotonic() < end, "a save is not committed after 30 s"
            time.sleep(0.001)


class BreakAt(Settled):
    """Ends the fit after `batches` batches, or in the validation after them."""

    def __init__(self, batches: int | None, *, in_validation: bool = False) -> None:
        self.batches, self.in_validation, self.seen = batches, in_validation, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.loop_state.total_batches == self.batches and not self.in_validation:
            raise Broken

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.loop_state.total_batches == self.batches and self.in_validation:
            raise Broken


class Scored(Regression):
    """Logs its training loss, and a validation score out of a list, by the number of batches trained on."""

    def __init__(self, scores: tuple[float, ...] = (3.0, 1.0, 2.0, 0.5, 4.0), batches: int = 4) -> None:
        super().__init__()
        self.scores, self.batches = scores, batches
        self.norm = torch.nn.BatchNorm1d(4)

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        noisy = torch.nn.functional.dropout(self.norm(inputs), 0.2, self.training)
        return torch.nn.functional.mse_loss(self.net(noisy), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        number = (self.trainer.loop_state.total_batches - 1) // self.batches
        self.log("score", self.scores[number % len(self.scores)])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr / 10, momentum=0.9)


def run(
    folder: Path, callbacks: Callable[[Path], list[Callback]], *, stop_at: int | None = None, in_validation: bool = False,
    module: Callable[[], L.LightningModule] = Scored, epochs: int = 5, every: int | None = 1, **kwargs: Any,
) -> tuple[L.Trainer, L.LightningModule, list[Callback]]:  # fmt: skip
    """A fit of 4 batches an epoch that resumes by itself from what an earlier one has committed in `folder`."""
    torch.manual_seed(5)
    made, net = callbacks(folder / "files"), module()
    config = L.CheckpointConfig(uri=f"file://{folder}/commits", every_n_steps=every, run="test")
    fit = trainer(
        max_epochs=epochs, callbacks=[*made, BreakAt(stop_at, in_validation=in_validation)], enable_checkpointing=True,
        checkpoint=config, num_sanity_val_steps=0, default_root_dir=folder, **kwargs,
    )  # fmt: skip
    try:
        fit.fit(net, loader(32, 8, shuffle=True), loader(8, 8))
    except Broken:
        assert stop_at is not None
    else:
        assert stop_at is None
    return fit, net, made


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fitted(
    checkpoints: Callback | list[Callback], folder: Path, module: Any = None, **kwargs: Any
) -> L.Trainer:
    """A fit of 4 batches an epoch that writes files."""
    fit = trainer(
        callbacks=checkpoints,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **kwargs,
    )
    fit.fit(module or Scored(), loader(32, 8), loader(8, 8))
    return fit


def listed(folder: Path) -> set[str]:
    """Its files, of any depth."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
