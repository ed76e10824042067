"""BasePredictionWriter: keep what `predict` finds."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer


class WriteInterval(StrEnum):
    """When a prediction writer writes."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        return self in (WriteInterval.BATCH, WriteInterval.BATCH_AND_EPOCH)

    @property
    def on_epoch(self) -> bool:
        return self in (WriteInterval.EPOCH, WriteInterval.BATCH_AND_EPOCH)


class BasePredictionWriter(Callback):
    """`lightning.pytorch.callbacks.BasePredictionWriter`: override one of the two methods, or both.

    Every rank writes what it has predicted itself; the indices say which samples of the dataset that were.
    `predict(return_predictions=False)` keeps nothing for "batch", so that memory does not grow. Raises
    MisconfigurationException for another interval.
    """

    def __init__(self, write_interval: str = "batch") -> None:
        try:
            self.interval = WriteInterval(write_interval)
        except ValueError:
            known = ", ".join(repr(str(kind)) for kind in WriteInterval)
            raise MisconfigurationException(
                f"write_interval: {write_interval!r} is none of {known}"
            ) from None

    def write_on_batch_end(  # noqa: PLR0917 - Lightning's signature
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, batch_indices: Sequence[int] | None,
        batch: Any, batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        """What predict_step returned for one batch. Raises NotImplementedError."""
        raise NotImplementedError(f"{type(self).__name__} has no write_on_batch_end")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """All of this rank: by batch, or, with several loaders, by loader and batch. Raises NotImplementedError."""
        raise NotImplementedError(f"{type(self).__name__} has no write_on_epoch_end")

    def on_predict_batch_end(  # noqa: PLR0917 - Lightning's signature
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if not self.interval.on_batch:
            return
        indices = _loop(trainer).current_batch_indices
        self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.interval.on_epoch:
            loop = _loop(trainer)
            self.write_on_epoch_end(trainer, pl_module, loop.predictions, loop.epoch_batch_indices)


def _loop(trainer: Trainer) -> Any:
    if trainer.predict_loop is None:
        raise RuntimeError("a prediction writer writes in trainer.predict only")
    return trainer.predict_loop
