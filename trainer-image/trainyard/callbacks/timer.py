"""Timer: how long stages take, and an end to training after a given time."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.checkpoint.triggers import TimeTrigger
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")
_TRAIN, _VALIDATE, _TEST = _STAGES = ("train", "validate", "test")
"""The values of RunningStage, whose module cannot be imported before the Trainer's, which imports this one."""


class Interval(StrEnum):
    """When the time is looked at."""

    STEP = "step"
    EPOCH = "epoch"


class Timer(Callback):
    """`lightning.pytorch.callbacks.Timer`. `duration` ("DD:HH:MM:SS", timedelta, or keywords of one) bounds training, over
    all restarts of the run; rank 0's clock counts. It is looked at the more often the nearer the end is, so that most
    steps cost nothing: training may overrun by the step in which the time is up.

    Raises MisconfigurationException for a duration or interval that it cannot read.
    """

    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        self._duration = None if duration is None else seconds_of(duration)
        try:
            self._interval = Interval(interval)
        except ValueError:
            raise MisconfigurationException(
                f"Timer(interval={interval!r}): is neither 'step' nor 'epoch'"
            ) from None
        self._verbose = verbose
        self._start: dict[str, float | None] = dict.fromkeys(_STAGES)
        self._end: dict[str, float | None] = dict.fromkeys(_STAGES)
        self._offset = 0.0
        """Seconds of training before this process."""
        self._trigger: TimeTrigger | None = None
        self._batches = 0

    # ---- what users read

    def start_time(self, stage: str = _TRAIN) -> float | None:
        """Monotonic seconds (time.monotonic); None before it began. `stage`: "train", "validate" or "test"."""
        return self._start[str(stage)]

    def end_time(self, stage: str = _TRAIN) -> float | None:
        """Monotonic seconds; None while it lasts."""
        return self._end[str(stage)]

    def time_elapsed(self, stage: str = _TRAIN) -> float:
        """Seconds; of training, with those before restarts."""
        start, end = self.start_time(stage), self.end_time(stage)
        offset = self._offset if stage == _TRAIN else 0.0
        if start is None:
            return offset
        return (time.monotonic() if end is None else end) - start + offset

    def time_remaining(self, stage: str = _TRAIN) -> float | None:
        """Seconds; None without a duration."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    # ---- stages

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(_TRAIN)
        left = self.time_remaining()
        if left is None:
            return
        self._batches = 0
        self._trigger = TimeTrigger(
            left, leader=trainer.is_global_zero,
            broadcast=lambda verdict: tuple(trainer.strategy.peers.broadcast(verdict)),
        )  # fmt: skip
        self._check(trainer, 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(_TRAIN)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(_VALIDATE)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(_VALIDATE)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(_TEST)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(_TEST)

    def _begin(self, stage: str) -> None:
        self._start[stage], self._end[stage] = time.monotonic(), None

    def _finish(self, stage: str) -> None:
        self._end[stage] = time.monotonic()

    # ---- the end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._interval is Interval.STEP:
            self._batches += 1
            self._check(trainer, self._batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._interval is Interval.EPOCH:
            self._batches += 1
            self._check(trainer, self._batches)

    def _check(self, trainer: Trainer, count: int) -> None:
        """All ranks at the same counts."""
        if self._trigger is None or trainer.should_stop or not self._trigger.due(count):
            return
        trainer.should_stop = True
        if self._verbose and trainer.is_global_zero:
            _log.info("%s of training are over: it ends here", timedelta(seconds=self._duration or 0))

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        elapsed = state_dict.get("time_elapsed", {})
        self._offset = float(elapsed.get(_TRAIN, 0.0))


def seconds_of(duration: str | timedelta | dict[str, int]) -> float:
    """Raises MisconfigurationException for what is no duration."""
    if isinstance(duration, str):
        parts = duration.strip().split(":")
        if len(parts) != 4 or not all(part.isdigit() for part in parts):
            raise MisconfigurationException(
                f"duration: {duration!r} is not like '01:06:00:00' (days, hours, minutes, seconds)"
            )
        days, hours, minutes, seconds = map(int, parts)
        duration = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(duration, dict):
        try:
            duration = timedelta(**duration)
        except TypeError as error:
            raise MisconfigurationException(f"duration: {duration!r}: {error}") from None
    if not isinstance(duration, timedelta):
        raise MisconfigurationException(f"duration: {duration!r} is no string, timedelta or dict")
    return duration.total_seconds()
