"""When a bar is drawn, and for what. How it looks is the subclasses' business."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.progress.progress_bar import Batches, ProgressBar
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer


class LiveBar(ProgressBar):
    """A bar that is redrawn in place: one for the epoch, and one below it for a validation.

    A batch costs a comparison and a look at the clock, unless a redraw is due: every `refresh_rate` batches, though
    never more often than every `shortest` seconds, and, if the screen would be older than `longest` seconds by then,
    earlier. Raises MisconfigurationException for a `refresh_rate` below 0; 0 shows nothing.
    """

    shortest: float = 0.1
    longest: float = math.inf

    def __init__(self, refresh_rate: int) -> None:
        super().__init__()
        if not isinstance(refresh_rate, int) or refresh_rate < 0:
            raise MisconfigurationException(
                f"refresh_rate: {refresh_rate!r} is no number of batches (0: no bar)"
            )
        self._refresh_rate = refresh_rate
        self._enabled = True
        self._clock: Callable[[], float] = time.monotonic
        self._soonest = self._latest = 0.0
        self._total: Batches = math.inf
        """Of the bar that moves now."""
        self._placed = True
        """The bar of this epoch stands where the epoch began: not at 0 after a resume in its middle."""
        self._trained = self._evaluated = 0
        """Batches of the epoch, and of the loader that is evaluated."""

    @property
    def refresh_rate(self) -> int:
        return self._refresh_rate

    @property
    def is_enabled(self) -> bool:
        return self._enabled and self._refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        return not self.is_enabled

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # ---- how it looks

    @abstractmethod
    def _open(self, stage: str, description: str, total: Batches) -> None:
        """Show the bar of `stage`, one of "sanity", "train", "validation", "test", "predict", at 0; again for each
        epoch and each loader."""

    @abstractmethod
    def _place(self, stage: str, start: int) -> None:
        """What comes before `start` was not done here: it counts for the position, not for the speed."""

    @abstractmethod
    def _draw(self, stage: str, done: int, metrics: dict[str, Any] | None) -> None:
        """None: without touching the metrics."""

    @abstractmethod
    def _close(self, stage: str) -> None:
        """That loop is over."""

    @abstractmethod
    def _leave(self) -> None:
        """Give the terminal back as it was. May be called twice."""

    # ---- when

    def _due(self, done: int) -> bool:
        if done == self._total:
            return True
        now = self._clock()
        return now >= self._soonest and (done % self._refresh_rate == 0 or now >= self._latest)

    def _update(self, stage: str, done: int, metrics: dict[str, Any] | None = None) -> None:
        self._safely(self._draw, stage, done, metrics)
        now = self._clock()
        self._soonest, self._latest = now + self.shortest, now + self.longest

    def _evaluate(self, stage: str, done: int) -> None:
        self._evaluated = done
        if self.is_enabled and self._due(done):
            self._update(stage, done)

    def _begin(self, stage: str, description: str, total: Batches) -> None:
        self._total, self._soonest, self._evaluated = total, 0.0, 0
        self._latest = self._clock() + self.longest
        self._safely(self._open, stage, description, total)

    def _safely(self, draw: Callable[..., None], *args: Any) -> None:
        """A terminal that has gone away must not end a training."""
        if self.is_disabled:
            return
        try:
            draw(*args)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "closed file" not in str(error):
                raise
            self.disable()

    # ---- training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        of = trainer.max_epochs
        name = f"Epoch {trainer.current_epoch}" + (f"/{of - 1}" if of is not None and of > 0 else "")
        self._begin("train", name, self.total_train_batches)
        self._placed, self._trained = False, 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._placed:
            self._placed = True
            if batch_idx:
                self._trained = batch_idx
                self._safely(self._place, "train", batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained = done = batch_idx + 1
        if self.is_enabled and self._due(done):
            self._update("train", done, self.get_metrics(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_enabled:
            self._update("train", self._trained, self.get_metrics(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_enabled:  # what was logged in on_train_epoch_end is there only now
            self._update("train", self._trained, self.get_metrics(trainer, pl_module))
        self._safely(self._close, "train")

    # ---- validation, within a fit and by itself

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("sanity", self.sanity_check_description, math.inf)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._safely(self._close, "sanity")
        self.reset_dataloader_idx_tracker()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin("validation", self.validation_description, math.inf)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self.has_dataloader_changed(dataloader_idx):
            return
        sanity = trainer.sanity_checking
        name = self.sanity_check_description if sanity else self.validation_description
        self._begin(
            "sanity" if sanity else "validation",
            f"{name} DataLoader {dataloader_idx}",
            self.total_val_batches_current_dataloader,
        )

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate("sanity" if trainer.sanity_checking else "validation", batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._safely(self._close, "validation")
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn == "fit":
            self._total, self._soonest = self.total_train_batches, 0.0
            if self.is_enabled:
                self._update("train", self._trained, self.get_metrics(trainer, pl_module))

    # ---- test and predict

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("test", self.test_description, math.inf)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            name = f"{self.test_description} DataLoader {dataloader_idx}"
            self._begin("test", name, self.total_test_batches_current_dataloader)

    def on_test_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate("test", batch_idx + 1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update("test", self._evaluated)
        self._safely(self._close, "test")
        self.reset_dataloader_idx_tracker()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("predict", self.predict_description, math.inf)

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            name = f"{self.predict_description} DataLoader {dataloader_idx}"
            self._begin("predict", name, self.total_predict_batches_current_dataloader)

    def on_predict_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate("predict", batch_idx + 1)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update("predict", self._evaluated)
        self._safely(self._close, "predict")
        self.reset_dataloader_idx_tracker()

    # ---- the end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._safely(self._leave)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._safely(self._leave)
