"""CombinedLoader: a collection of loaders that is iterated like one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainyard.errors import MisconfigurationException

__all__ = ["CombinedLoader"]

_MODES = ("min_size", "max_size_cycle", "max_size", "sequential")


class CombinedLoader:
    """`lightning.pytorch.utilities.combined_loader.CombinedLoader`.

    `iterables`: a loader, or a list, tuple or dict of loaders, nested in any way. `mode`: "min_size" ends with the
    shortest, "max_size" with the longest (None stands for what has ended), "max_size_cycle" too (what has ended begins
    anew), "sequential" gives one after the other. Iterating gives (batch, batch_idx, dataloader_idx); the batch has the
    shape of `iterables`, except with "sequential". Raises MisconfigurationException for another mode.

    A Trainer reads the loaders itself, with the same result, so that it can go on from the middle.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in _MODES:
            raise MisconfigurationException(f"mode: {mode!r} is none of {', '.join(map(repr, _MODES))}")
        self._iterables, self._mode = iterables, mode
        self._flattened = flatten(iterables)
        self._limits: list[int | float] | None = None
        self._batches: Iterator[tuple[Any, int, int]] | None = None

    @property
    def iterables(self) -> Any:
        return self._iterables

    @property
    def mode(self) -> str:
        return self._mode

    @property
    def flattened(self) -> list[Any]:
        """The loaders, in order."""
        return self._flattened

    @flattened.setter
    def flattened(self, loaders: list[Any]) -> None:
        if len(loaders) != len(self._flattened):
            raise ValueError(f"flattened: {len(loaders)} loaders in the place of {len(self._flattened)}")
        self._iterables, self._flattened = rebuild(self._iterables, loaders), list(loaders)

    @property
    def sampler(self) -> Any:
        """The samplers, in the shape of the collection."""
        return rebuild(self._iterables, [getattr(loader, "sampler", None) for loader in self._flattened])

    @property
    def batch_sampler(self) -> Any:
        """The batch samplers, in the shape of the collection."""
        return rebuild(
            self._iterables, [getattr(loader, "batch_sampler", None) for loader in self._flattened]
        )

    @property
    def limits(self) -> list[int | float] | None:
        """Batches of each loader at most, with "sequential"."""
        return self._limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if isinstance(limits, int | float):
            limits = [limits] * len(self._flattened)
        if limits is not None and len(limits) != len(self._flattened):
            raise ValueError(f"limits: {len(limits)} for {len(self._flattened)} loaders")
        self._limits = limits

    def __iter__(self) -> CombinedLoader:
        self._batches = _sequence(self) if self._mode == "sequential" else _side_by_side(self)
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if self._batches is None:
            raise TypeError("call iter() on the CombinedLoader first")
        return next(self._batches)

    def reset(self) -> None:
        """Let go of the loaders' iterators, and of the workers behind them."""
        self._batches = None

    def __len__(self) -> int:
        """In batches. Raises TypeError if a loader that counts has no length."""
        try:
            lengths = [len(loader) for loader in self._flattened]
        except (TypeError, NotImplementedError) as error:
            raise TypeError(
                f"a CombinedLoader has a length only if all its loaders have one ({error})"
            ) from None
        if self._mode == "sequential":
            limits = self._limits or [float("inf")] * len(lengths)
            return int(sum(min(n, limit) for n, limit in zip(lengths, limits, strict=True)))
        return min(lengths, default=0) if self._mode == "min_size" else max(lengths, default=0)


def _side_by_side(combined: CombinedLoader) -> Iterator[tuple[Any, int, int]]:
    loaders, mode = combined.flattened, combined.mode
    iterators = [iter(loader) for loader in loaders]
    ended = [False] * len(loaders)
    number = 0
    while loaders:
        batches = []
        for n, loader in enumerate(loaders):
            try:
                batches.append(next(iterators[n]))
                continue
            except StopIteration:
                ended[n] = True
            if mode == "min_size" or all(ended):
                return
            if mode == "max_size_cycle":
                iterators[n] = iter(loader)
                batches.append(next(iterators[n]))
            else:
                iterators[n] = iter(())
                batches.append(None)
        yield rebuild(combined.iterables, batches), number, 0
        number += 1


def _sequence(combined: CombinedLoader) -> Iterator[tuple[Any, int, int]]:
    limits = combined.limits or [float("inf")] * len(combined.flattened)
    for index, (loader, limit) in enumerate(zip(combined.flattened, limits, strict=True)):
        if limit > 0:
            for number, batch in enumerate(loader):
                yield batch, number, index
                if number + 1 >= limit:
                    break


def flatten(collection: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dicts."""
    if isinstance(collection, dict):
        return [leaf for value in collection.values() for leaf in flatten(value)]
    if isinstance(collection, list | tuple):
        return [leaf for value in collection for leaf in flatten(value)]
    return [collection]


def rebuild(collection: Any, leaves: list[Any]) -> Any:
    """The same collection with other leaves."""
    rest = iter(leaves)

    def build(part: Any) -> Any:
        if isinstance(part, dict):
            made = {key: build(value) for key, value in part.items()}
            return made if type(part) is dict else type(part)(made)
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*(build(value) for value in part))
        if isinstance(part, list | tuple):
            return type(part)(build(value) for value in part)
        return next(rest)

    return build(collection)
