"""Sums without rounding: the same whatever the order, and however many processes have added up parts of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction


class ExactSum:
    """Of floats, each times a weight. What is not finite adds up as floats do, which is exact for it."""

    __slots__ = ("_finite", "_other")

    def __init__(self) -> None:
        self._finite = Fraction(0)
        self._other = 0.0

    def add(self, value: float, weight: float = 1) -> None:
        if math.isfinite(value):
            self._finite += Fraction(value) * Fraction(weight)
        else:
            self._other += value * weight

    def merge(self, other: ExactSum) -> None:
        self._finite += other._finite
        self._other += other._other

    def __float__(self) -> float:
        """Correctly rounded; inf where it is too great."""
        return self.over(Fraction(1))

    def over(self, count: Fraction) -> float:
        """The sum divided by `count`, correctly rounded; NaN for a count of 0."""
        if self._other != 0.0 or count == 0:
            return self._other if count else math.nan
        try:
            return float(self._finite / count)
        except OverflowError:
            return math.inf if self._finite > 0 else -math.inf

    @property
    def finite(self) -> Fraction:
        return self._finite

    def to_state(self) -> list[str]:
        return [str(self._finite), repr(self._other)]

    @classmethod
    def from_state(cls, state: list[str]) -> ExactSum:
        made = cls()
        made._finite, made._other = Fraction(state[0]), float(state[1])
        return made


def reduced(values: Iterable[float], how: str) -> float:
    """Their "mean", "sum", "min" or "max"; NaN if there is one among them, or none at all."""
    found = list(values)
    if not found or any(math.isnan(value) for value in found):
        return math.nan
    if how in ("min", "max"):
        return min(found) if how == "min" else max(found)
    total = ExactSum()
    for value in found:
        total.add(value)
    return total.over(Fraction(len(found))) if how == "mean" else float(total)
