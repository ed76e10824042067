"""Which samples make which batch: a pure function of (seed, epoch, samples already used, world size).

There is no sampler state. The position is one global cursor (`trainyard_api.checkpoints.Cursor`), so that a run may go
on with another number of ranks, workers or prefetched batches, and uses each sample of an epoch exactly once all the
same.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    of the optimizer step, is the gradient of the mean over all samples of that step."""

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

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world

    @property
    def usable(self) -> int:
        """Samples used of each epoch. The tail that does not fill a global batch is dropped only with drop_last."""
        whole, tail = divmod(self.samples, self.global_batch)
        batches = whole + bool(tail and not self.drop_last)
        if isinstance(self.limit, int):
            batches = min(batches, self.limit)
        elif self.limit is not None:
            batches = int(batches * self.limit)
        return min(self.samples, batches * self.global_batch)

    def batches_from(self, used: int) -> int:
        """How many batches are left after `used` samples."""
        return -(-max(0, self.usable - used) // self.global_batch)

    def iterate(self, rank: int, used: int = 0) -> Iterator[Batch]:
        """The batches after the first `used` samples, which must be a point where the optimizer has stepped."""
        usable, window = self.usable, self.global_batch * self.accumulate
        whole = self.window(rank, window)
        for opened in range(used, usable, window):
            size = min(window, usable - opened)
            ends = opened + size == usable
            yield from shifted(whole if size == window else self.window(rank, size), opened, ends=ends)

    def window(self, rank: int, samples: int) -> list[Batch]:
        """The batches of one optimizer step over `samples` samples, as if it was an epoch's first and only one."""
        batches = []
        for start in range(0, samples, self.global_batch):
            size = min(self.global_batch, samples - start)
            share, rest = divmod(size, self.world)
            low = start + rank * share + min(rank, rest)
            high = low + share + (rank < rest)
            closes = start + size == samples
            weight = Fraction((high - low) * self.world, samples)
            batches.append(Batch(start, size, low, high, closes, closes, 1 if weight == 1 else weight))
        return batches


def shifted(window: list[Batch], by: int, *, ends: bool) -> Iterator[Batch]:
    """The same window `by` samples later; `ends`: the epoch ends with it."""
    for start, size, low, high, last, steps, weight in window:
        yield Batch(start + by, size, low + by, high + by, last and ends, steps, weight)
