"""What the loops iterate over."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Protocol

from trainyard.data.sampler import Batch


class Feed(Protocol):
    """One epoch after the other of (plan, data), from any position.

    The position is the loop's: (epoch, samples used of it), world-independent, `plan.end` after a batch. What else a feed
    needs to go on exactly is in `state()`, which is taken at a save and belongs to the batch that `iterate` gave last. A
    resume is: `load_state(...)` with the state of the same rank, then `iterate(epoch, used)`. The process's generators
    must be as in the checkpoint by then, and `iterate` leaves them as it found them when it moves to a position.
    """

    given: Any
    """The user's loader, or collection of loaders."""
    accumulate: int
    """Batches per optimizer step, for each of `origin` ranks. It may be set between two epochs and counts from the next
    `iterate` on."""
    origin: int | None
    """How many ranks the run began with; None: as many as there are now. As `accumulate`."""

    def steps(self, accumulate: int) -> int | None:
        """Optimizer steps per epoch with that many batches each, instead of `accumulate`; None if unknown."""
        ...

    @property
    def scale(self) -> Fraction:
        """Batches of a step, for each that it had on `origin` ranks."""
        ...

    @property
    def batches(self) -> int | None:
        """Per epoch, for this rank and world; None if unknown."""
        ...

    def batches_from(self, used: int) -> int | None:
        """How many are left after the first `used` samples."""
        ...

    def position(self, batches: int) -> int:
        """Samples used after that many batches of an epoch."""
        ...

    def iterate(self, epoch: int, used: int) -> Iterator[tuple[Batch, Any]]:
        """The epoch after its first `used` samples. Where the length is unknown, `Batch.last` is known all the same."""
        ...

    def indices(self, plan: Batch) -> list[Any]:
        """Where in the dataset the samples of the batch are that `iterate` gave last; empty if there is no telling."""
        ...

    def state(self) -> dict[str, Any]:
        """Tensors and primitives; empty for a feed whose position says it all. Every rank's may differ.

        Between `load_state` and the next `iterate` it is what was loaded.
        """
        ...

    def load_state(self, state: dict[str, Any], *, moved: bool = False) -> None:
        """For the next `iterate`. `moved`: the world size is another one, and `state` is that of rank 0."""
        ...

    def close(self) -> None:
        """After the last epoch: workers that live from epoch to epoch end now, and not when somebody collects garbage."""
        ...
