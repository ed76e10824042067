"""When a fit ends and when it validates. Pure: the position comes in, the answer goes out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from trainyard.callbacks.timer import seconds_of
from trainyard.errors import MisconfigurationException
from trainyard.loops.state import LoopState

_ONE = Fraction(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The Trainer's arguments of these names, with Lightning's defaults filled in."""

    max_epochs: int
    """-1: no limit."""
    max_steps: int
    """Optimizer steps; -1: no limit."""
    min_epochs: int = 0
    min_steps: int = 0
    val_check_interval: int | float = 1.0
    """float: fraction of an epoch; int: batches."""
    check_val_every_n_epoch: int | None = 1
    val_check_seconds: float | None = None
    """In place of `val_check_interval`: by rank 0's clock."""

    @classmethod
    def of(cls, given: Mapping[str, Any], quick: int) -> Schedule:
        """From the Trainer's arguments; `quick`: batches of a fast_dev_run, else 0."""
        max_epochs, max_steps = given["max_epochs"], given["max_steps"]
        no_end = max_steps == -1 and given["max_time"] is None
        interval = given["val_check_interval"]
        seconds = None
        if interval is None or quick:
            interval = 1.0
        elif not isinstance(interval, int | float):
            interval, seconds = 1.0, seconds_of(interval)
        elif interval <= 0 or (isinstance(interval, float) and interval > 1.0):
            raise MisconfigurationException(
                f"val_check_interval: {interval!r} is neither a number of batches nor a fraction of an epoch (up to 1.0)"
            )
        if isinstance(interval, float) and given["check_val_every_n_epoch"] is None and seconds is None:
            raise MisconfigurationException(
                "check_val_every_n_epoch=None counts batches over all epochs: give val_check_interval as an int"
            )
        return cls(
            max_epochs=1 if quick else max_epochs if max_epochs is not None else 1000 if no_end else -1,
            max_steps=quick or (-1 if max_steps is None else max_steps),
            min_epochs=given["min_epochs"] or 0, min_steps=given["min_steps"] or 0, val_check_interval=interval,
            check_val_every_n_epoch=given["check_val_every_n_epoch"], val_check_seconds=seconds,
        )  # fmt: skip

    def done(self, state: LoopState, *, should_stop: bool) -> bool:
        """Between two epochs."""
        epochs = self.max_epochs != -1 and state.epoch >= self.max_epochs
        return epochs or self.done_in_epoch(state, should_stop=should_stop)

    def done_in_epoch(self, state: LoopState, *, should_stop: bool) -> bool:
        """After an optimizer step."""
        if self.max_steps != -1 and state.step >= self.max_steps:
            return True
        return should_stop and state.epoch >= self.min_epochs and state.step >= self.min_steps

    def validates_within(
        self, state: LoopState, *, batches: int | None, last: bool, scale: Fraction = _ONE, counts: int = 1
    ) -> bool:
        """After a batch that is not the epoch's last; `batches` is the epoch's length if it is known. `scale`: batches of
        now for each of when the run began (`Feed.scale`). `counts`: `Batch.counts`."""
        every = self.val_check_interval
        if self.val_check_seconds is not None:
            return False
        if last or not self._this_epoch(state):
            return False
        if isinstance(every, float):
            if every == 1.0 or batches is None:
                return False
            every = max(1, int(batches * every))
        else:
            every = max(1, round(every * scale))
        count = state.total_batches if self.check_val_every_n_epoch is None else state.batches
        return count // every > (count - counts) // every

    def validates_at_end(
        self, state: LoopState, *, complete: bool, should_stop: bool, scale: Fraction = _ONE
    ) -> bool:
        """At the end of an epoch, or of what of it was trained before a stop. `scale`: as above."""
        if self.val_check_seconds is not None or not self._this_epoch(state) or not (complete or should_stop):
            return False
        every = self.val_check_interval
        count = state.total_batches if self.check_val_every_n_epoch is None else state.batches
        return isinstance(every, float) or math.ceil(count / scale) % every == 0

    def total_steps(self, per_epoch: int | None) -> int | None:
        """Optimizer steps of the whole run, None if there is no telling."""
        limits = [] if self.max_steps == -1 else [self.max_steps]
        if self.max_epochs != -1 and per_epoch is not None:
            limits.append(self.max_epochs * per_epoch)
        return min(limits, default=None)

    def _this_epoch(self, state: LoopState) -> bool:
        every = self.check_val_every_n_epoch
        return every is None or (state.epoch + 1) % every == 0
