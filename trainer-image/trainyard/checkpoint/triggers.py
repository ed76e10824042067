"""When to save. All ranks decide alike, and no rank asks another one on an ordinary step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainyard.checkpoint import interval
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.costs import Costs
from trainyard.checkpoint.interval import Choice, Life
from trainyard.peers import Peers
from trainyard_api.checkpoints import Record

log = logging.getLogger("trainyard.checkpoint")

_FURTHEST_LOOK = 16
_NEWS = 1.25
"""By how much the automatic interval must have changed for a line in the log."""
_AGAIN = 8
"""A save that was left out is tried again after this part of the interval."""


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
        self.seconds = seconds
        """Rank 0's counts. It may be changed on the way: it holds from the next look on."""
        self._broadcast = broadcast
        self._leader = leader
        self._clock = clock
        self._next_look = 0
        self._not_before = self._saved = self._looked = clock()
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

    def put_off(self, seconds: float) -> None:
        """What was due was not done: not again before `seconds` from now. Of interest on rank 0."""
        self._not_before = self._clock() + seconds

    def _decide(self, step: int, now: float) -> tuple[bool, int]:
        left = max(self._saved + self.seconds, self._not_before) - now
        if left <= 0:
            return True, step + 1
        if self._looked_step is None or step <= self._looked_step:
            return False, step + 1
        per_step = max((now - self._looked) / (step - self._looked_step), 1e-9)
        return False, step + max(1, min(_FURTHEST_LOOK, int(left / per_step / 2)))


class Triggers:
    """Of one attempt: which of the triggers of its configuration calls for a save.

    `resumed` comes first. Then all ranks ask `due` at the same steps, and say `saved` when they have begun a save;
    `committed` is of interest on rank 0, who hears of commits.
    """

    def __init__(
        self, config: CheckpointConfig, peers: Peers, clock: Callable[[], float] = time.monotonic, *,
        ceiling: float = interval.CEILING_SECONDS,
    ) -> None:  # fmt: skip
        self._peers, self._clock, self._ceiling = peers, clock, ceiling
        self._leader = peers.rank == 0
        self._every = config.every_n_steps
        self._seconds = config.every_n_seconds
        self._auto = config.auto
        self._steps: StepTrigger | None = None
        self._time: TimeTrigger | None = None
        self._waiting = False
        """The time trigger has called for a save, and it has not begun."""
        self._stalls, self._commits = Costs(), Costs()
        self._before = Life()
        self._began = clock()
        self._told = 0.0

    def resumed(self, step: int, records: Sequence[Record], *, now: float | None = None) -> None:
        """The training begins after `step`. `records`: on rank 0 the log as it was found, without the fence of this
        attempt; `now`: Unix seconds."""
        self._began = self._clock()
        self._waiting = False
        self._steps = StepTrigger(self._every, seen=step) if self._every is not None else None
        self._before = interval.life_of(
            records, now=time.time() if now is None else now, ceiling=self._ceiling
        )
        commits = sorted((r for r in records if r.kind == "commit"), key=lambda r: (r.attempt, r.seq))
        alike = [
            r.stall_seconds for r in commits if r.world_size == self._peers.world and r.stall_seconds > 0
        ]
        self._stalls = Costs(alike)
        seconds = self._seconds
        if self._auto:
            seconds = self._choose() if self._stalls else interval.FIRST_SECONDS
        if seconds is not None:
            self._time = TimeTrigger(
                seconds, leader=self._leader, broadcast=self._tell, clock=self._clock,
            )  # fmt: skip

    def due(self, step: int, *, epoch_end: bool) -> str:
        """Why to save now: "steps", "time", "auto" or "epoch"; empty: not now. To be asked once after each step."""
        if self._steps is None and self._time is None:
            return "epoch" if epoch_end else ""
        if self._time is not None and self._waiting:
            self._waiting = False
            self._time.put_off(self._time.seconds / _AGAIN)
        by_steps = self._steps is not None and self._steps.due(step)
        by_time = self._time is not None and self._time.due(step)
        self._waiting = by_time
        if by_steps:
            return "steps"
        return ("auto" if self._auto else "time") if by_time else ""

    def saved(self, stall_seconds: float) -> None:
        """All ranks have begun a save, for which the training stood still for so long."""
        self._waiting = False
        self._stalls.saw(stall_seconds)
        if self._time is not None:
            self._time.saved()
            self._adjust(self._time)

    def committed(self, seconds: float) -> None:
        """A save was committed so long after its stall."""
        self._commits.saw(seconds)
        if self._time is not None:
            self._adjust(self._time)

    @property
    def life(self) -> Life:
        """Of the run up to now: what a commit's record says as `alive_seconds` and `failures`."""
        return Life(self._before.seconds + self._clock() - self._began, self._before.failures)

    def _tell(self, verdict: tuple[bool, int]) -> tuple[bool, int]:
        due, step = self._peers.broadcast(verdict)
        return bool(due), int(step)

    def _adjust(self, trigger: TimeTrigger) -> None:
        if self._auto:
            trigger.seconds = self._choose()

    def _choose(self) -> float:
        """Young's interval as of now, with a line in the log when it is news."""
        choice: Choice = interval.choose(
            stall=self._stalls.usual, commit=self._commits.usual, mttf=self.life.mttf, ceiling=self._ceiling
        )
        ratio = choice.seconds / self._told if self._told else _NEWS + 1
        if self._leader and not 1 / _NEWS <= ratio <= _NEWS:
            before = f" (was {self._told:.0f} s)" if self._told else ""
            log.info("checkpoint interval%s: %s", before, choice)
            self._told = choice.seconds
        return choice.seconds
