"""Whether a save that begins now can be committed in the seconds that are left. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from trainyard.checkpoint.costs import Costs

_STAGE_BYTES = 1 << 30
_UPLOAD_BYTES = 100 << 20
"""A second, by rank: what is assumed before the first save of an attempt. Any bucket's near enough server does better."""
_FIXED_SECONDS = 0.25
"""Of a save of nothing: a few requests, one after the other."""
_RESERVE = 0.1
"""Of the time left: for what comes after the commit."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with the seconds that are left."""

    saves: bool
    """Begin a save, after the one in flight."""
    awaits: bool
    """See the save in flight through; without `saves` it is the last one."""
    why: str = ""
    """A sentence without a capital and a full stop, if no save is begun."""


class Deadline:
    """Of one rank. It knows what saves have cost; `begun` and `saw` tell it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stalls, self._commits = Costs(), Costs()
        self._begun: float | None = None

    def begun(self) -> None:
        """A save is staged, and on its way."""
        self._begun = self._clock()

    def saw(self, stall: float, commit: float, size: int = 0) -> None:
        """A save was committed: seconds of its stall, seconds from there to the commit, bytes of this rank's shard."""
        self._begun = None
        self._stalls.saw(stall)
        self._commits.saw(commit)

    def dropped(self) -> None:
        """The save in flight came to nothing."""
        self._begun = None

    def fits(self, seconds_left: float, size: int = 0) -> bool:
        """Whether there is time for a save. `size`: bytes of this rank's shard, of use before the first one."""
        return self.needs(size) <= self._usable(seconds_left)

    def needs(self, size: int = 0) -> float:
        """Seconds from the beginning of a save to its commit: the 95th percentile of what was seen."""
        stall = self._stalls.worst if self._stalls else size / _STAGE_BYTES
        commit = self._commits.worst if self._commits else _FIXED_SECONDS + size / _UPLOAD_BYTES
        return stall + commit

    def plan(self, seconds_left: float, size: int = 0) -> Plan:
        """The newest state if there is time for it, else the save in flight if there is time for that."""
        left = self._usable(seconds_left)
        needs, flight = self.needs(size), 0.0
        if self._begun is not None:
            elapsed = self._clock() - self._begun
            flight = max(0.0, (self._commits.worst if self._commits else needs) - elapsed)
        in_flight = self._begun is not None
        if flight + needs <= left:
            return Plan(True, in_flight)
        of = "as the slowest ones before it" if self._commits else "as far as its size tells"
        why = f"a save takes {needs:.1f} s, {of}, and {left:.1f} s are left"
        if in_flight:
            why += f" of which the save on its way takes {flight:.1f} s"
        return Plan(False, in_flight and flight <= left, why)

    @staticmethod
    def _usable(seconds_left: float) -> float:
        return seconds_left * (1 - _RESERVE)
