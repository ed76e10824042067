"""Progress where nobody redraws a screen: it reads well in `kubectl logs`, and in a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.progress.progress_bar import Batches, ProgressBar, known, short

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_QUIET_SECONDS = 10.0
"""Evaluation says where it is no more often than this."""


class ProgressPrinter(ProgressBar):
    """Ours: a line on rank 0 each time that numbers come from the device, one for each validation, and now and then
    one from a long evaluation.

    `epoch 1 step 150/450 loss=0.31 samples/s=5210 eta=0:31`, with everything logged with prog_bar=True.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._enabled = True
        self._clock = clock
        self._printed: int | None = None
        self._began: tuple[float, int] | None = None
        self._spoke = 0.0

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            print(*args, **{"flush": True} | kwargs)

    # ---- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = self._printed = None

    def on_logs_flushed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if not self._enabled or self._printed == step:
            return
        self._printed = step
        total = known(trainer.estimated_stepping_batches)
        values = {name: short(value) for name, value in self.get_metrics(trainer, pl_module).items()}
        values.pop("v_num", None)
        if "loss" not in values and trainer.loss is not None:
            values = {"loss": short(trainer.loss), **values}
        if trainer.samples_per_second:
            values["samples/s"] = f"{trainer.samples_per_second:.0f}"
        if (left := self._seconds_left(step, total)) is not None:
            values["eta"] = duration(left)
        where = f"{step}/{total}" if total and total > 0 else f"{step}"
        self._line(f"epoch {trainer.current_epoch} step {where}", values)

    def _seconds_left(self, step: int, total: int | None) -> float | None:
        """From the speed since the first line of this fit: a resume counts what it did itself."""
        now = self._clock()
        if self._began is None:
            self._began = now, step
        since, first = self._began
        if not total or step <= first or step > total:
            return None
        return (now - since) / (step - first) * (total - step)

    # ---- evaluation

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return  # `Trainer.validate` prints a table of its own
        values = {name: short(value) for name, value in sorted(trainer.validation_metrics.items())}
        self._line(f"epoch {trainer.current_epoch} step {trainer.global_step} validation", values)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._spoke = self._clock()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._spoke = self._clock()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._spoke = self._clock()

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._now_and_then(self.validation_description, batch_idx, dataloader_idx)

    def on_test_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._now_and_then(self.test_description, batch_idx, dataloader_idx)

    def on_predict_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._now_and_then(self.predict_description, batch_idx, dataloader_idx)

    def _now_and_then(self, what: str, batch_idx: int, dataloader_idx: int) -> None:
        now = self._clock()
        if now - self._spoke < _QUIET_SECONDS:
            return
        self._spoke = now
        self._dataloader_idx = dataloader_idx
        total = known(self._total(what))
        done = f"{batch_idx + 1}/{total}" if total else f"{batch_idx + 1}"
        loader = f" loader {dataloader_idx}" if dataloader_idx else ""
        self._line(f"{what.lower()}{loader} batch {done}", {})

    def _total(self, what: str) -> Batches:
        if what == self.test_description:
            return self.total_test_batches_current_dataloader
        if what == self.predict_description:
            return self.total_predict_batches_current_dataloader
        return self.total_val_batches_current_dataloader

    def _line(self, head: str, values: dict[str, str]) -> None:
        text = " ".join(f"{name}={value}" for name, value in values.items())
        self.print(f"{head} {text}".rstrip())


def duration(seconds: float) -> str:
    """`0:05`, `12:34`, `1:02:03`, `2 days, 3:04:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days} day{'s' * (days > 1)}, {clock}" if days else clock
