"""When to save. All ranks decide alike, and no rank asks another one on an ordinary step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_FURTHEST_LOOK = 16


@dataclass(slots=True)
class StepTrigger:
    """Every `every` optimizer steps of the run. With several optimizers a batch may go past the step itself."""

    every: int
    seen: int = 0
    """The step that was asked about last."""

    def due(self, step: int) -> bool:
        """To be asked by all ranks at the same steps."""
        before, self.seen = self.seen, step
        return step // self.every > before // self.every


class TimeTrigger:
    """Every `seconds`, by rank 0's clock.

    Rank 0 tells the others at certain steps whether to save now and at which step to listen next. It looks ahead by
    half of the steps that are expected to fit into the time left, at most 16: so a save is late by a few steps at
    most, and most steps need no message.
    """

    def __init__(
        self, seconds: float, *, broadcast: Callable[[tuple[bool, int]], tuple[bool, int]], leader: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._seconds = seconds
        self._broadcast = broadcast
        self._leader = leader
        self._clock = clock
        self._next_look = 0
        self._saved = self._looked = clock()
        self._looked_step: int | None = None

    def due(self, step: int) -> bool:
        """To be asked by all ranks at every step."""
        if step < self._next_look:
            return False
        now = self._clock()
        verdict = (False, 0)
        if self._leader:
            verdict = self._decide(step, now)
        due, self._next_look = self._broadcast(verdict)
        self._looked, self._looked_step = now, step
        return due

    def saved(self) -> None:
        """A save has begun: the time counts from here."""
        self._saved = self._clock()
        self._next_look = 0

    def _decide(self, step: int, now: float) -> tuple[bool, int]:
        left = self._saved + self._seconds - now
        if left <= 0:
            return True, step + 1
        if self._looked_step is None or step <= self._looked_step:
            return False, step + 1
        per_step = max((now - self._looked) / (step - self._looked_step), 1e-9)
        return False, step + max(1, min(_FURTHEST_LOOK, int(left / per_step / 2)))
