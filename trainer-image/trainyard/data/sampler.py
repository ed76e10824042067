"""Which samples make which batch: a pure function of (seed, epoch, samples already used, world size).

There is no sampler state. The position is one global cursor (`trainyard_api.checkpoints.Cursor`), so that a run may go
on with another number of ranks, workers or prefetched batches, and uses each sample of an epoch exactly once all the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from trainyard.reproducibility import derived_seed

if TYPE_CHECKING:
    import torch


def permutation(seed: int, epoch: int, samples: int, *, shuffle: bool) -> torch.Tensor:
    """The order of an epoch, the same on all ranks: int64 of length `samples`."""
    import torch

    if not shuffle:
        return torch.arange(samples)
    generator = torch.Generator().manual_seed(derived_seed("epoch", seed, epoch))
    return torch.randperm(samples, generator=generator)


class Batch(NamedTuple):
    """One global batch, from the point of view of one rank. A tuple, because one is made for every batch."""

    start: int
    """Position in the epoch's order of the global batch's first sample."""
    size: int
    """Samples of all ranks."""
    low: int
    high: int
    """This rank's samples are the positions [low, high); none if it is padding."""
    last: bool
    """The last one of the epoch."""
    steps: bool
    """The optimizer steps after it."""
    weight: Fraction | int
    """Factor of this rank's mean loss, such that the average over the ranks of the gradients, summed over the batches
    of the optimizer step, is the gradient of the mean over all samples of that step. Of a virtual rank: the sum over the
    virtual ranks."""
    virtual: int | None = None
    """Which virtual rank it is (`deterministic="elastic"`). Then `start` and `size` are those of the whole step."""
    turn: int = 0
    """Of a virtual rank: how many of its batches in this step come before."""
    counts: int = 1
    """How many batches the epoch is further after it. Of a virtual rank: 0 but for the process's last one of the step."""

    @property
    def padding(self) -> bool:
        """This rank has no sample: it goes through the motions with one of the batch's, at weight 0, because the other
        ranks wait for it in the collectives."""
        return self.low == self.high

    @property
    def positions(self) -> range:
        return range(self.start, self.start + 1) if self.low == self.high else range(self.low, self.high)

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """How the samples of an epoch fall into batches."""

    samples: int
    """Of the dataset."""
    batch_size: int
    """Per rank."""
    world: int = 1
    accumulate: int = 1
    """Batches per optimizer step."""
    drop_last: bool = False
    limit: int | float | None = None
    """Batches (int) or fraction of the batches (float) to use of each epoch."""
    origin: int | None = None
    """How many ranks the run began with, if that is not `world`. What the run counts by stays what it was: a step's
    samples, where an epoch ends, and `limit`."""

    @property
    def global_batch(self) -> int:
        """The most samples that the ranks go through at a time."""
        return self.batch_size * self.world

    @property
    def counted(self) -> int:
        """Samples of what the run's arguments mean by a batch of all ranks."""
        return self.batch_size * (self.origin or self.world)

    @property
    def step_samples(self) -> int:
        """Of one optimizer step, but for an epoch's last: at any world size those that the run began with."""
        return self.counted * self.accumulate

    @property
    def usable(self) -> int:
        """Samples used of each epoch. The tail that does not fill a global batch is dropped only with drop_last."""
        whole, tail = divmod(self.samples, self.counted)
        batches = whole + bool(tail and not self.drop_last)
        if isinstance(self.limit, int):
            batches = min(batches, self.limit)
        elif self.limit is not None:
            batches = int(batches * self.limit)
        return min(self.samples, batches * self.counted)

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.usable // self.step_samples)

    @property
    def scale(self) -> Fraction:
        """Batches of a step, for each that it had when the run began."""
        return Fraction(len(self._sizes(self.step_samples)), self.accumulate)

    def batches_from(self, used: int) -> int:
        """How many batches are left after `used` samples."""
        steps, tail = divmod(max(0, self.usable - used), self.step_samples)
        return steps * len(self._sizes(self.step_samples)) + len(self._sizes(tail))

    def used_after(self, batches: int) -> int:
        """Samples used after that many batches of an epoch whose length does not matter."""
        sizes = self._sizes(self.step_samples)
        steps, more = divmod(batches, len(sizes))
        return steps * self.step_samples + sum(sizes[:more])

    def iterate(self, rank: int, used: int = 0) -> Iterator[Batch]:
        """The batches after the first `used` samples, which must be a point where the optimizer has stepped."""
        return self.in_steps(lambda samples: self.window(rank, samples), used)

    def in_steps(self, window: Callable[[int], list[Batch]], used: int) -> Iterator[Batch]:
        """As `iterate`; `window` makes the batches of a step of so many samples."""
        usable, samples = self.usable, self.step_samples
        whole = window(samples)
        for opened in range(used, usable, samples):
            size = min(samples, usable - opened)
            ends = opened + size == usable
            yield from shifted(whole if size == samples else window(size), opened, ends=ends)

    def window(self, rank: int, samples: int) -> list[Batch]:
        """The batches of one optimizer step over `samples` samples, as if it was an epoch's first and only one."""
        batches = []
        start = 0
        for size in self._sizes(samples):
            low, high = share(start, size, rank, self.world)
            closes = start + size == samples
            weight = Fraction((high - low) * self.world, samples)
            batches.append(Batch(start, size, low, high, closes, closes, 1 if weight == 1 else weight))
            start += size
        return batches

    def _sizes(self, samples: int) -> list[int]:
        """Of the batches of one step.

        On another number of ranks than the run began with they are as equal as can be: a remainder of a few samples
        would take a batch's time, and batch normalisation cannot do with one sample.
        """
        count = -(-samples // self.global_batch)
        if self.origin in (None, self.world):
            return [min(self.global_batch, samples - n * self.global_batch) for n in range(count)]
        return [samples // count + (n < samples % count) for n in range(count)]


def share(start: int, size: int, rank: int, world: int) -> tuple[int, int]:
    """The positions [low, high) of `rank`'s samples, of a batch of `size` samples that begins at `start`."""
    each, rest = divmod(size, world)
    low = start + rank * each + min(rank, rest)
    return low, low + each + (rank < rest)


def shifted(window: list[Batch], by: int, *, ends: bool) -> Iterator[Batch]:
    """The same window `by` samples later; `ends`: the epoch ends with it."""
    for start, size, low, high, last, steps, *rest in window:
        yield Batch(start + by, size, low + by, high + by, last and ends, steps, *rest)


def rescaled(accumulate: int, origin: int | None, world: int) -> int:
    """Batches of each rank per step, where batches cannot be divided anew: the least number for which a step has no
    fewer of them, over `world` ranks, than `accumulate` batches of `origin` ranks."""
    return -(-accumulate * (origin or world) // world)
