"""Which samples make which batch: a pure function of (seed, epoch, samples already used, world size).

There is no sampler state. The position is one global cursor (`trainyard_api.checkpoints.Cursor`), so that a run may go
on with another number of ranks, workers or prefetched batches, and uses each sample of an epoch exactly once all the
same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One global batch, from the point of view of one rank."""

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
    weight: Fraction
    """Factor of this rank's mean loss, such that the average over the ranks of the gradients, summed over the batches
    of the optimizer step, is the gradient of the mean over all samples of that step."""

    @property
    def padding(self) -> bool:
        """This rank has no sample: it goes through the motions with one of the batch's, at weight 0, because the other
        ranks wait for it in the collectives."""
        return self.low == self.high

    @property
    def positions(self) -> range:
        return range(self.start, self.start + 1) if self.padding else range(self.low, self.high)

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
        window = self.global_batch * self.accumulate
        for opened in range(used, self.usable, window):
            closed = min(opened + window, self.usable)
            for start in range(opened, closed, self.global_batch):
                size = min(self.global_batch, closed - start)
                share, rest = divmod(size, self.world)
                low = start + rank * share + min(rank, rest)
                high = low + share + (rank < rest)
                yield Batch(
                    start=start, size=size, low=low, high=high, last=start + size == self.usable,
                    steps=start + size == closed, weight=Fraction((high - low) * self.world, closed - opened),
                )  # fmt: skip
