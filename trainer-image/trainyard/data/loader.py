"""From a user's DataLoader to batches at any position of any epoch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from trainyard.data.sampler import Batch, EpochPlan, permutation
from trainyard.errors import MisconfigurationException
from trainyard.reproducibility import SEED_ENV, WORKERS_ENV, derived_seed, reseed

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class Feed(Protocol):
    """What the loops iterate over."""

    @property
    def batches(self) -> int | None:
        """Per epoch, for this rank and world; None if unknown."""
        ...

    def batches_from(self, used: int) -> int | None: ...

    def iterate(self, epoch: int, used: int) -> Iterator[tuple[Batch, Any]]:
        """The epoch after its first `used` samples. The iterator holds no state that anybody must save."""
        ...


class _Indices(list[int]):
    """The indices of one batch, with the seed of its random transforms. A list, because DataLoader passes it on."""

    seed: int = 0


class _SeededDataset:
    """In a DataLoader worker: what random transforms do to a batch depends on (seed, epoch, position) alone, not on
    what the worker did before. So a resumed run gets the very same batches, with any number of workers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: _Indices) -> list[Any]:
        reseed(indices.seed)
        if callable(fetch := getattr(self.dataset, "__getitems__", None)):
            return fetch(indices)  # type: ignore[no-any-return]
        return [self.dataset[i] for i in indices]


@dataclass(frozen=True, slots=True)
class _WorkerInit:
    """First thing in each DataLoader worker."""

    then: Callable[[int], None] | None
    rank: int

    def __call__(self, worker: int) -> None:
        # The process that owns the workers decides about their end. A signal to the whole group must not take the
        # batches away that are needed for the last steps before a save.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.environ.get(WORKERS_ENV) == "1":
            reseed(derived_seed("worker", os.environ.get(SEED_ENV, "0"), self.rank, worker))
        if self.then is not None:
            self.then(worker)


class _Position:
    """Batch sampler of the DataLoader: where the next iterator begins is set right before it is made."""

    def __init__(self, plan: EpochPlan, rank: int, seed: int, *, shuffle: bool) -> None:
        self.plan, self.rank, self.seed, self.shuffle = plan, rank, seed, shuffle
        self.epoch = self.used = 0

    def __len__(self) -> int:
        return self.plan.batches_from(self.used)

    def __iter__(self) -> Iterator[_Indices]:
        epoch = self.epoch
        order = permutation(self.seed, epoch, self.plan.samples, shuffle=self.shuffle)
        for batch in self.plan.iterate(self.rank, self.used):
            positions = batch.positions
            indices = _Indices(order[positions.start : positions.stop].tolist())
            indices.seed = derived_seed("batch", self.seed, epoch, positions.start)
            yield indices


class SampledFeed:
    """A DataLoader over a map-style dataset, re-made with our sampling."""

    def __init__(
        self, loader: DataLoader[Any], plan: EpochPlan, *, rank: int, seed: int, shuffle: bool
    ) -> None:
        import torch
        from torch.utils.data import DataLoader

        self._position = _Position(plan, rank, seed, shuffle=shuffle)
        # A generator of its own: making an iterator draws from it, and must not move the global one.
        self._generator = torch.Generator()
        self._loader = DataLoader(
            _SeededDataset(loader.dataset) if loader.num_workers else loader.dataset,  # type: ignore[arg-type]
            batch_sampler=self._position,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=_WorkerInit(loader.worker_init_fn, rank) if loader.num_workers else None,
            multiprocessing_context=loader.multiprocessing_context,
            generator=self._generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    @property
    def plan(self) -> EpochPlan:
        return self._position.plan

    @property
    def seed(self) -> int:
        return self._position.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._position.seed = seed

    @property
    def batches(self) -> int:
        return self.plan.batches_from(0)

    def batches_from(self, used: int) -> int:
        return self.plan.batches_from(used)

    def iterate(self, epoch: int, used: int) -> Iterator[tuple[Batch, Any]]:
        position = self._position
        position.epoch, position.used = epoch, used
        self._generator.manual_seed(derived_seed("loader", position.seed, epoch, used))
        yield from zip(self.plan.iterate(position.rank, used), self._loader, strict=True)


class PlainFeed:
    """A loader that is used as it is: an iterable dataset, a sampler of the user's, or anything that can be iterated.

    Its position is a number of batches. On a resume the batches before it are read again and thrown away; that is
    exact only if the loader itself gives the same batches each time.
    """

    def __init__(self, loader: Any, *, limit: int | float | None, accumulate: int) -> None:
        self._loader, self._accumulate = loader, accumulate
        length: int | None
        try:
            length = len(loader)
        except TypeError:
            length = None
        if isinstance(limit, int):
            length = limit if length is None else min(limit, length)
        elif limit is not None:
            if length is None:
                raise MisconfigurationException(
                    "a fraction of a loader without a length: limit it by a number of batches"
                )
            length = int(length * limit)
        self.batches = length

    def batches_from(self, used: int) -> int | None:
        return None if self.batches is None else max(0, self.batches - used)

    def iterate(self, epoch: int, used: int) -> Iterator[tuple[Batch, Any]]:
        from fractions import Fraction

        if callable(set_epoch := getattr(getattr(self._loader, "sampler", None), "set_epoch", None)):
            set_epoch(epoch)
        iterator = iter(self._loader)
        upcoming, number = next(iterator, None), 0
        while upcoming is not None and (self.batches is None or number < self.batches):
            data, upcoming = upcoming, next(iterator, None)
            last = upcoming is None or number + 1 == self.batches
            if number >= used:
                yield Batch(
                    start=number, size=1, low=number, high=number + 1, last=last,
                    steps=last or (number + 1) % self._accumulate == 0, weight=Fraction(1, self._accumulate),
                ), data  # fmt: skip
            number += 1


def make_feed(
    loader: Any, *, rank: int, world: int, seed: int, accumulate: int = 1, limit: int | float | None = None,
    resample: bool = True, what: str = "train",
) -> Feed:  # fmt: skip
    """The feed for what a `*_dataloader` hook returned. Raises MisconfigurationException."""
    from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
    from torch.utils.data.sampler import BatchSampler

    plain = not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not resample
    if plain:
        return PlainFeed(loader, limit=limit, accumulate=accumulate)
    ours = (
        type(loader.sampler) in (RandomSampler, SequentialSampler)
        and type(loader.batch_sampler) is BatchSampler
    )
    ours = ours and not getattr(loader.sampler, "replacement", False)
    if not ours or loader.batch_size is None:
        if world == 1:
            return PlainFeed(loader, limit=limit, accumulate=accumulate)
        raise MisconfigurationException(
            f"the {what} DataLoader has a sampler of its own ({type(loader.sampler).__name__}), which cannot be divided "
            f"among {world} ranks; leave it out, or divide it yourself and say Trainer(use_distributed_sampler=False)"
        )
    plan = EpochPlan(
        samples=len(loader.dataset), batch_size=loader.batch_size, world=world, accumulate=accumulate,
        drop_last=loader.drop_last, limit=limit,
    )  # fmt: skip
    shuffle = isinstance(loader.sampler, RandomSampler)
    return SampledFeed(loader, plan, rank=rank, seed=seed, shuffle=shuffle)
