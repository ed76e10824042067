"""Virtual ranks: a step is always computed in the same parts, however many processes there are to compute them.

Each of V virtual ranks has the batches that a rank would have among V ranks. A process computes those of a contiguous
block of virtual ranks, one after the other: first all batches that one of them has in a step, then the next one's.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from trainyard.data.sampler import Batch, EpochPlan, share

if TYPE_CHECKING:
    from trainyard.data.order import Cursor


def block(rank: int, world: int, virtual: int) -> range:
    """The virtual ranks of process `rank`: as many as another's, or one more. None if there are more processes."""
    return range(rank * virtual // world, (rank + 1) * virtual // world)


def virtual_window(plan: EpochPlan, ranks: range, samples: int) -> list[Batch]:
    """One process's batches of a step over `samples` samples; `plan.world` is the number of virtual ranks.

    A virtual rank without a sample in a batch (an epoch's end) has no batch there. A process that has none at all gets
    one that is padding, because it steps with the others.
    """
    turns = range(-(-samples // plan.global_batch))
    found = []
    for rank in ranks:
        for turn in turns:
            start = turn * plan.global_batch
            low, high = share(start, min(plan.global_batch, samples - start), rank, plan.world)
            if low < high:
                weight = Fraction(high - low, samples)
                found.append(
                    Batch(0, samples, low, high, False, False, 1 if weight == 1 else weight, rank, turn, 0)
                )
    if not found:
        found.append(Batch(0, samples, 0, 0, False, False, 0, ranks.start, 0, 0))
    found[-1] = found[-1]._replace(last=True, steps=True, counts=len(turns))
    return found


class StepCursor:
    """An order's cursor for batches that come in another order within a step: it takes a step's items as one."""

    def __init__(self, cursor: Cursor) -> None:
        self.digest = cursor.digest
        """Of the items up to the last step that was taken whole."""
        self._cursor = cursor
        self._start = -1
        self._items: list[Any] = []

    def take(self, batch: Batch) -> list[Any]:
        if batch.start != self._start:
            self._items = self._cursor.take(batch._replace(low=batch.start, high=batch.end))
            self._start = batch.start
        if batch.steps:
            self.digest = self._cursor.digest
        low, high = (0, 1) if batch.padding else (batch.low - batch.start, batch.high - batch.start)
        return self._items[low:high]

    def ahead(self, count: int) -> int:
        return self._cursor.ahead(count)
