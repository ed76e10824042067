"""What saves have cost so far: the newest few, so that an old outage is forgotten."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

_KEPT = 20


class Costs:
    """Seconds of one kind of work, as measured."""

    def __init__(self, seconds: Collection[float] = ()) -> None:
        self._seen = deque(seconds, maxlen=_KEPT)

    def __bool__(self) -> bool:
        return bool(self._seen)

    def saw(self, seconds: float) -> None:
        self._seen.append(max(0.0, seconds))

    @property
    def usual(self) -> float:
        """The median; 0 of nothing. One slow save among many does not move it.

        The first one warms memory and connections up: it counts only as long as there is no other.
        """
        seen = list(self._seen)
        ordered = sorted(seen[1:] or seen)
        if not ordered:
            return 0.0
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def worst(self) -> float:
        """The 95th percentile (nearest rank): of fewer than 20 the longest. 0 of nothing."""
        ordered = sorted(self._seen)
        return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else 0.0
