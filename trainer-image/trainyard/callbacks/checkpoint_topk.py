"""Which checkpoints are worth keeping. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class TopK:
    """The best `k` of what was scored; -1 keeps all. Of equals the older one is the better, and goes first when full."""

    k: int
    mode: str
    """"min" or "max"."""
    scores: dict[str, float] = field(default_factory=dict)
    """In the order in which they came."""

    @property
    def worst_score(self) -> float:
        """Of anything at all."""
        return math.inf if self.mode == "min" else -math.inf

    def score(self, value: float) -> float:
        """What is no number is the worst there is."""
        return self.worst_score if math.isnan(value) else value

    def better(self, one: float, other: float) -> bool:
        return one < other if self.mode == "min" else one > other

    @property
    def full(self) -> bool:
        return self.k != -1 and len(self.scores) >= self.k

    @property
    def best(self) -> str | None:
        pick = min if self.mode == "min" else max
        return pick(self.scores, key=self.scores.__getitem__, default=None)

    @property
    def kth(self) -> str | None:
        """The worst of those kept."""
        pick = max if self.mode == "min" else min
        return pick(self.scores, key=self.scores.__getitem__, default=None)

    def admits(self, value: float) -> bool:
        """Whether `value` is to be kept."""
        if not self.full:
            return True
        return self.kth is not None and self.better(value, self.scores[self.kth])

    def leaving(self) -> str | None:
        """Who must go for the next one."""
        return self.kth if self.full else None

    def add(self, name: str, value: float) -> None:
        """After `leaving` was told; drops that one."""
        leaving = self.leaving()
        if leaving is not None:
            del self.scores[leaving]
        self.scores[name] = self.score(value)
