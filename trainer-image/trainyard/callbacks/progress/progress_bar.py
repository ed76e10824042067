"""What all progress bars have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

Batches = int | float
"""A number of batches, `math.inf` if there is no telling."""


class ProgressBar(Callback):
    """`lightning.pytorch.callbacks.ProgressBar`: the base of a bar of one's own. It shows nothing itself.

    Only rank 0 shows progress: `setup` calls `disable` on the others.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._dataloader_idx: int | None = None

    # ---- to be overridden

    def disable(self) -> None:
        """Show nothing from now on."""
        raise NotImplementedError

    def enable(self) -> None:
        """The inverse of `disable`."""
        raise NotImplementedError

    def print(self, *args: Any, **kwargs: Any) -> None:
        """As the built-in, in a way that does not tear the bar."""
        print(*args, **kwargs)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float]:
        """What to show: the logger's version as `v_num`, and what was logged with `prog_bar=True`.

        These are plain numbers, as new as the last time that some came from the device: asking for them costs no wait.
        """
        version = next((logger.version for logger in trainer.loggers if logger.version is not None), None)
        metrics: dict[str, int | str | float] = {}
        if version is not None:
            metrics["v_num"] = version[-4:] if isinstance(version, str) else version
        return {**metrics, **trainer.progress_bar_metrics}

    # ---- what to show

    @property
    def trainer(self) -> Trainer:
        """Raises TypeError before `setup`."""
        if self._trainer is None:
            raise TypeError(f"{type(self).__name__} has no trainer before its setup")
        return self._trainer

    @property
    def sanity_check_description(self) -> str:
        return "Sanity Checking"

    @property
    def train_description(self) -> str:
        return "Training"

    @property
    def validation_description(self) -> str:
        return "Validation"

    @property
    def test_description(self) -> str:
        return "Testing"

    @property
    def predict_description(self) -> str:
        return "Predicting"

    @property
    def total_train_batches(self) -> Batches:
        """Of the present epoch; inf if unknown."""
        return self.trainer.num_training_batches

    @property
    def total_val_batches(self) -> Batches:
        """Of all loaders of a validation; inf if one is unknown."""
        return sum(_each(self.trainer.num_val_batches))

    @property
    def total_val_batches_current_dataloader(self) -> Batches:
        trainer = self.trainer
        return self._current(
            trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        )

    @property
    def total_test_batches_current_dataloader(self) -> Batches:
        return self._current(self.trainer.num_test_batches)

    @property
    def total_predict_batches_current_dataloader(self) -> Batches:
        return self._current(self.trainer.num_predict_batches)

    def _current(self, batches: Batches | Sequence[Batches]) -> Batches:
        """A list of loaders may be evaluated one after the other (a number each) or at once (one number)."""
        numbers = _each(batches)
        index = self._dataloader_idx or 0
        return numbers[index] if index < len(numbers) else math.inf

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Since the last call."""
        before, self._dataloader_idx = self._dataloader_idx, dataloader_idx
        return before != dataloader_idx

    def reset_dataloader_idx_tracker(self) -> None:
        self._dataloader_idx = None

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()


def known(total: Batches) -> int | None:
    """A number for whoever draws; None if there is no telling."""
    return None if math.isinf(total) else int(total)


def short(value: Any) -> str:
    """Four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _each(batches: Batches | Sequence[Batches]) -> Sequence[Batches]:
    return batches if isinstance(batches, Sequence) else [batches]
