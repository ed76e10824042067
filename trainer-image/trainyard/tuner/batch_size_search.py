"""In which order to try batch sizes. Pure: what a trial is comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainyard.errors import MisconfigurationException

MODES = ("power", "binsearch")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizeSearch:
    """`power` doubles until it does not fit; `binsearch` then halves the interval between what fits and what does not."""

    mode: str = "power"
    init_val: int = 2
    max_trials: int = 25
    margin: float = 0.05
    """Of what `binsearch` has found, so much is left free, if there is a bound at all."""
    max_val: int = 8192

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise MisconfigurationException(f"mode: {self.mode!r} is none of {', '.join(map(repr, MODES))}")
        for name in ("init_val", "max_trials", "max_val"):
            if getattr(self, name) < 1:
                raise MisconfigurationException(f"{name}: {getattr(self, name)} is less than 1")
        if not 0 <= self.margin < 1:
            raise MisconfigurationException(f"margin: {self.margin} is not in [0, 1)")

    def run(self, fits: Callable[[int], bool], samples: int | None) -> int | None:
        """The largest size found; None if none of those tried fits. More than `samples` makes no difference."""
        most = self.max_val if samples is None else max(1, min(self.max_val, samples))
        size, good, bad = min(self.init_val, most), 0, 0
        for _ in range(self.max_trials):
            if fits(size):
                good = size
            else:
                bad = size
            following = self._next(good, bad, most)
            if following is None:
                break
            size = following
        if bad and self.mode == "binsearch":
            good = max(min(good, 1), int(good * (1 - self.margin)))
        return good or None

    def _next(self, good: int, bad: int, most: int) -> int | None:
        """`good`: the largest that fits, `bad`: the smallest that does not; 0 if there is none yet."""
        if not bad:
            return None if good == most else min(2 * good, most)
        if not good:
            return None if bad == 1 else bad // 2
        if self.mode == "power" or bad - good <= 1:
            return None
        return (good + bad) // 2
