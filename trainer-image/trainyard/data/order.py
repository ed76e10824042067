"""In which order an epoch uses its items: samples, or, with a batch sampler of the user's, batches.

An order is the same on all ranks, and a function of (seed, epoch) and, for a sampler of the user's, of what it
remembers. Each rank takes its part of it.
"""

from __future__ import annotations

import itertools
import zlib
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from trainyard.data.memory import Memory
from trainyard.data.sampler import Batch, permutation
from trainyard.reproducibility import OwnDraws, derived_seed, isolate_rng

Take = Callable[[Batch], list[Any]]
"""The rank's items of a batch: its own, or one of the batch's if it is padding."""


_SKIPPED = 4096
"""Items to pass over at a time on the way to a position."""


class Order(Protocol):
    """`samples` is None if nobody knows how many items there are."""

    @property
    def samples(self) -> int | None: ...

    def open(self, seed: int, epoch: int, used: int) -> Cursor:
        """At the position after the first `used` items."""
        ...


class Cursor(Protocol):
    """Batches must be asked for one after the other."""

    digest: int
    """Of the items up to the last batch; 0 where the order needs no proof."""

    def take(self, batch: Batch) -> list[Any]: ...

    def ahead(self, count: int) -> int:
        """How many items are left, at most `count`."""
        ...


class Counted:
    """0, 1, 2, ..., or a permutation of it."""

    def __init__(self, samples: int, *, shuffle: bool) -> None:
        self.samples, self.shuffle = samples, shuffle

    def open(self, seed: int, epoch: int, used: int) -> Cursor:
        return _Shuffled(permutation(seed, epoch, self.samples, shuffle=True)) if self.shuffle else _InOrder()


class _InOrder:
    digest = 0

    def take(self, batch: Batch) -> list[Any]:
        return list(batch.positions)

    def ahead(self, count: int) -> int:
        return count


class _Shuffled(_InOrder):
    def __init__(self, order: Any) -> None:
        self._order = order.numpy()

    def take(self, batch: Batch) -> list[Any]:
        _, _, low, high, *_ = batch
        taken: list[Any] = (
            self._order[low:high] if low < high else self._order[batch.start : batch.start + 1]
        ).tolist()
        return taken


class Drawn:
    """What a sampler, or a batch sampler, of the user's gives.

    It draws from generators that are seeded by (seed, epoch), so that the ranks agree, a resume only has to run it again
    to the position, and training draws the same numbers with any sampler. It is asked for no more than is needed next.
    """

    def __init__(self, sampler: Any, *owners: Any) -> None:
        self.sampler = sampler
        self.memory = Memory(sampler, *owners)
        self.known = _draws_once(sampler)
        """All that it draws from the process's generators, it draws when it begins."""

    @property
    def samples(self) -> int | None:
        try:
            return len(self.sampler)
        except (TypeError, NotImplementedError):
            return None

    def open(self, seed: int, epoch: int, used: int) -> Cursor:
        set_epoch(self.sampler, epoch)
        return _Pulled(self, derived_seed("sampler", seed, epoch), used)


class _Pulled:
    def __init__(self, order: Drawn, seed: int, used: int) -> None:
        self.digest = 0
        self._proves = not order.known
        self._buffer: list[Any] = []
        self._apart = False
        """Whether to draw from generators of its own; not here, where that is so for all of it."""
        with isolate_rng():
            self._draws = OwnDraws(seed)
            with self._draws:
                self._items: Iterator[Any] = iter(order.sampler)
                # The body of a generator function begins with the first item only.
                self._buffer += itertools.islice(self._items, 1)
                while used > 0 and (skipped := self._next(min(used, _SKIPPED))):
                    self._consume(skipped)
                    used -= len(skipped)
        self._apart = not order.known

    def take(self, batch: Batch) -> list[Any]:
        items = self._next(batch.size)
        self._consume(items)
        low, high = (batch.low, batch.high) if not batch.padding else (batch.start, batch.start + 1)
        return items[low - batch.start : high - batch.start]

    def ahead(self, count: int) -> int:
        missing = count - len(self._buffer)
        if missing > 0:
            self._buffer += self._pull(missing)
        return min(count, len(self._buffer))

    def _next(self, count: int) -> list[Any]:
        self.ahead(count)
        items, self._buffer = self._buffer[:count], self._buffer[count:]
        return items

    def _pull(self, count: int) -> list[Any]:
        if not self._apart:
            return list(itertools.islice(self._items, count))
        with self._draws:
            return list(itertools.islice(self._items, count))

    def _consume(self, items: list[Any]) -> None:
        if self._proves:
            self.digest = _digest(items, self.digest)


def _digest(items: list[Any], before: int) -> int:
    """Does not depend on how the items were cut into lists."""
    try:
        return zlib.crc32(array("q", items), before)
    except (TypeError, OverflowError):
        for item in items:
            before = zlib.crc32(repr(item).encode(), before)
        return before


def _draws_once(sampler: Any) -> bool:
    from torch.utils.data import (
        BatchSampler,
        DistributedSampler,
        RandomSampler,
        SequentialSampler,
        SubsetRandomSampler,
        WeightedRandomSampler,
    )

    if type(sampler) is BatchSampler:
        return _draws_once(sampler.sampler)
    return type(sampler) in (
        DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler,
    )  # fmt: skip


def set_epoch(owner: Any, epoch: int) -> None:
    """Tell a sampler, and one that it wraps, or a dataset or loader, which epoch it is."""
    for found in (owner, getattr(owner, "sampler", None), getattr(owner, "batch_sampler", None)):
        if callable(tell := getattr(found, "set_epoch", None)):
            tell(epoch)
