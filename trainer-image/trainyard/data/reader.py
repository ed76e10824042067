"""Reads what can only be iterated: iterable datasets, in DataLoader workers or here, and loaders of any make.

State goes by torchdata's protocol: `state_dict` and `load_state_dict` of the dataset (or loader), of its iterator, or of
both. Without it a position is reached by reading again what comes before it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainyard.data.memory import Memory, pack, unpack
from trainyard.data.order import set_epoch
from trainyard.reproducibility import WORKERS_ENV, derived_seed, reseed_cpu

DATA, NOTHING, END = range(3)
_ODD = 0x9E3779B97F4A7C15


class Place(NamedTuple):
    """Where in an epoch one worker is."""

    given: int = 0
    """Batches given."""
    state: Any = None
    """Of the dataset and its iterator after `state_at` batches; None: there was none."""
    state_at: int = 0


class Item(NamedTuple):
    """One batch, or a word about the worker. A tuple, so that pin_memory finds the tensors."""

    kind: int
    worker: int
    data: Any = None
    given: int = 0
    state: Any = None


class Reader(IterableDataset[Item]):
    """What is random in batch n of a worker depends on (seed, epoch, worker, n) alone. The ranks draw the same, as they
    do without us, so that they can shuffle alike and take their parts; unless seed_everything(workers=True) was said."""

    def __init__(
        self, source: Any, *, batch_size: int | None, drop_last: bool, collate: Callable[[Any], Any] | None,
        seed: int, rank: int, every: int, draws: bool = True, shared: bool = False,
    ) -> None:  # fmt: skip
        self.dataset = source
        self._batch_size, self._drop_last, self._collate = batch_size, drop_last, collate
        self._seed: tuple[int, ...] = (seed, rank) if os.environ.get(WORKERS_ENV) == "1" else (seed,)
        self._every, self._draws = every, draws
        self._iterator: Any = None
        self._memory = Memory(source)
        self._ended = self._took_end = False
        # Workers may live on from epoch to epoch; these are what they hear.
        self._round_epoch = torch.zeros(2, dtype=torch.int64)
        if shared:
            self._round_epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._places: list[Place] = []
        self._first = 0
        self._memories: list[dict[str, Any]] = []

    def begin(self, epoch: int, places: list[Place], first: int, memories: list[dict[str, Any]]) -> None:
        """The next iteration: `first` is the worker whose turn it is; `memories` are those of an older process's workers."""
        self._round_epoch[0] += 1
        self._round_epoch[1] = epoch
        self._places, self._first, self._memories = places, first, memories
        self._round = int(self._round_epoch[0])

    @property
    def stateful(self) -> bool:
        return is_stateful(self.dataset) or is_stateful(self._iterator)

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        now, epoch = self._round_epoch.tolist()
        place = Place()
        if now == self._round:  # what was said when this process began counts for its first epoch only
            place = self._places[worker] if self._places else place
            if worker < self._first:
                yield Item(NOTHING, worker)
            if info is not None and self._memories:
                self._memory.load(self._memories[worker])
        yield from self.read(worker, epoch, place)
        if info is not None:
            memory = self._memory.state()
            while True:
                yield Item(END, worker, state=memory)

    def read(self, worker: int, epoch: int, place: Place) -> Iterator[Item]:
        if place.state and "ended" in place.state:
            self._memory.load(place.state["ended"])
            self.take_end(place.state)
            return
        base = derived_seed("stream", *self._seed, epoch, worker)
        self._reseed(base)
        set_epoch(self.dataset, epoch)
        iterator = self._iterator = self._restored(place.state)
        number, self._ended = place.state_at, False
        while number < place.given:
            self._reseed(base + number * _ODD)
            self._fetch(iterator)
            number += 1
        while True:
            self._reseed(base + number * _ODD)
            found = self._fetch(iterator)
            if found is None and self._took_end:
                # It took the state of an epoch's end for the place to go on at, and begins with the next iteration.
                iterator = self._iterator = iter(self.dataset)
                found = self._fetch(iterator)
            self._took_end = False
            if found is None:
                return
            data = found[0] if self._collate is None else self._collate(found[0])
            number += 1
            kept = self.capture() if self._every and number % self._every == 0 else None
            yield Item(DATA, worker, data, number, kept)

    def capture(self) -> Any:
        """Of the dataset and its iterator, as they are now; None if they have no state.

        A last batch that was not full has ended the dataset's iteration: a state of that moment would be taken for the
        begin of the next one, or its end, as the dataset likes. Its attributes are not open to interpretation, where
        they hold it.
        """
        parts: dict[str, Any] = {"ended": self._memory.state()} if self._ended else {}
        if is_stateful(self.dataset):
            parts["source"] = pack(self.dataset.state_dict())
        if self._iterator is not self.dataset and is_stateful(self._iterator):
            parts["iterator"] = pack(self._iterator.state_dict())
        return parts or None

    def take_end(self, end: dict[str, Any] | None) -> None:
        """At the end of an iteration: what of `end`, from `capture`, the dataset's attributes do not tell."""
        if not end or "source" not in end or isinstance(self.dataset, DataLoader):
            return
        if repr(pack(self.dataset.state_dict())) != repr(end["source"]):
            self.dataset.load_state_dict(unpack(end["source"]))
            self._took_end = True

    def _restored(self, state: Any) -> Any:
        if not state:
            return iter(self.dataset)
        if "source" in state:
            self.dataset.load_state_dict(unpack(state["source"]))
        iterator = iter(self.dataset)
        if "iterator" in state:
            iterator.load_state_dict(unpack(state["iterator"]))
        return iterator

    def _fetch(self, iterator: Iterator[Any]) -> tuple[Any] | None:
        if self._batch_size is None:
            for sample in iterator:
                return (sample,)
            return None
        samples = list(itertools.islice(iterator, self._batch_size))
        short = self._ended = len(samples) < self._batch_size
        return None if not samples or (short and self._drop_last) else (samples,)

    def _reseed(self, seed: int) -> None:
        if self._draws:
            reseed_cpu(seed % 2**63)


def is_stateful(found: Any) -> bool:
    """torchdata's protocol."""
    return callable(getattr(found, "state_dict", None)) and callable(getattr(found, "load_state_dict", None))


def unchanged(item: Item) -> Item:
    """Collates nothing: the reader has done it."""
    return item
