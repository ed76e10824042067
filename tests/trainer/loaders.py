"""Loaders of many kinds for the tests of an exact resume. Whatever they draw, they draw at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from trainyard.utilities.combined_loader import CombinedLoader

COUNT = 23
Sample = tuple[int, torch.Tensor]


def noisy(number: int) -> Sample:
    """What a sample becomes depends on all of the process's generators."""
    noise = torch.randn(4) + random.random() + np.random.rand()
    return number, torch.arange(4.0) * 0.01 * number + 0.1 * noise


class Numbers(Dataset[Sample]):
    def __init__(self, count: int = COUNT) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, list):
            return torch.utils.data.default_collate([noisy(n) for n in number])
        return noisy(number)


class OwnGenerator(Numbers):
    """Transforms draw from a generator that nobody else knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(3)

    def __getitem__(self, number: Any) -> Any:
        return number, noisy(number)[1] + torch.from_numpy(self.rng.normal(size=4)).float()


class Drawing(Sampler[int]):
    """Draws each index when it is asked for."""

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[int]:
        for _ in range(COUNT):
            yield (
                random.randrange(COUNT) + int(torch.randint(COUNT, ())) + int(np.random.randint(COUNT))
            ) % COUNT


class Endless(Drawing):
    """Has no length, but an end."""

    def __len__(self) -> int:
        raise TypeError("no length")


class OwnGenerators(Sampler[int]):
    def __init__(self) -> None:
        self.generators = 0
        self.torch, self.numpy = torch.Generator().manual_seed(5), np.random.default_rng(5)
        self.python, self.legacy = random.Random(5), np.random.RandomState(5)

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[int]:
        for index in torch.randperm(COUNT, generator=self.torch).tolist():
            shift = (
                self.python.randrange(COUNT) + int(self.numpy.integers(COUNT)) + self.legacy.randint(COUNT)
            )
            yield (index + shift) % COUNT


class Counting(Sampler[int]):
    """Seeds itself by an epoch that it counts itself."""

    def __init__(self) -> None:
        self.rounds = 0

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[int]:
        self.rounds += 1
        yield from torch.randperm(COUNT, generator=torch.Generator().manual_seed(self.rounds)).tolist()


class Buckets(Sampler[list[int]]):
    """Batches of different lengths, drawn as they are asked for."""

    def __init__(self, length: bool = True) -> None:
        self.sized = length

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError("no length")
        return 7

    def __iter__(self) -> Iterator[list[int]]:
        for n in range(7):
            yield [random.randrange(COUNT) for _ in range(1 + n % 3)]


class Stream(IterableDataset[Sample]):
    """Each worker has its part; the parts are not of equal length."""

    def __init__(self, sized: bool = False) -> None:
        self.sized = sized

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError("no length")
        return COUNT

    def part(self) -> range:
        info = get_worker_info()
        return range(COUNT) if info is None else range(info.id * 5, COUNT if info.id else 5)

    def __iter__(self) -> Iterator[Sample]:
        for number in self.part():
            yield noisy(number)


class StatefulStream(Stream):
    """torchdata's protocol; an epoch of its own making, which no position tells."""

    def __init__(self, sized: bool = False) -> None:
        super().__init__(sized)
        self.at, self.start, self.rounds = 0, 0, 0

    def __iter__(self) -> Iterator[Sample]:
        start, self.start = self.start, 0
        for number in self.part()[start:]:
            self.at = number - self.part().start + 1
            label, data = noisy(number)
            yield label, data + 0.1 * self.rounds
        self.rounds += 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.rounds = state["at"], state["rounds"]


class InnerState(Stream):
    """As StatefulStream, with its state where no attribute shows it, which is back at the start after an epoch."""

    def __init__(self, sized: bool = False) -> None:
        super().__init__(sized)
        self.inner = {"at": 0, "rounds": 0}

    def __iter__(self) -> Iterator[Sample]:
        for number in self.part()[self.inner["at"] :]:
            self.inner["at"] += 1
            label, data = noisy(number)
            yield label, data + 0.1 * self.inner["rounds"]
        self.inner = {"at": 0, "rounds": self.inner["rounds"] + 1}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.inner)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner = dict(state)


class InnerStart(Stream):
    """Begins where it was told, once: the state of an epoch's end would make the next one empty."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = {"at": 0, "start": 0}

    def __iter__(self) -> Iterator[Sample]:
        start, self.inner["start"] = self.inner["start"], 0
        for number in self.part()[start:]:
            self.inner["at"] = number - self.part().start + 1
            yield noisy(number)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.inner["at"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner = {"at": state["at"], "start": state["at"]}


class Place:
    """An iterator with a state, of a dataset without one; numpy in it, as in many."""

    def __init__(self, numbers: range) -> None:
        self.numbers, self.at = numbers, np.array([0])

    def __iter__(self) -> Place:
        return self

    def __next__(self) -> Sample:
        if self.at[0] >= len(self.numbers):
            raise StopIteration
        self.at[0] += 1
        return noisy(self.numbers[int(self.at[0]) - 1])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class StreamOfPlaces(Stream):
    def __iter__(self) -> Iterator[Sample]:
        return Place(self.part())


class Handmade:
    """No DataLoader at all: an order and noise from the global generators."""

    def __init__(self, sized: bool = True) -> None:
        self.sized = sized

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError("no length")
        return 6

    def __iter__(self) -> Iterator[Any]:
        order = list(range(24))
        random.shuffle(order)
        for n in range(6):
            yield torch.utils.data.default_collate([noisy(i) for i in order[4 * n : 4 * n + 4]])


class HandmadeStateful(Handmade):
    """Its numbers differ from epoch to epoch; its position is its own affair."""

    def __init__(self, sized: bool = True) -> None:
        super().__init__(sized)
        self.round = self.batch = self.begin = 0

    def __iter__(self) -> Iterator[Any]:
        begin, self.begin = self.begin, 0
        for batch in range(begin, 6):
            self.batch = batch + 1
            yield torch.utils.data.default_collate([noisy(i + self.round) for i in range(self.batch)])
        self.round += 1

    def state_dict(self) -> dict[str, int]:
        return {"round": self.round, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.round, self.begin = state["round"], state["batch"]


class Subclass(DataLoader[Any]):
    """Does something to each batch, and has an argument of its own."""

    def __init__(self, factor: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def __iter__(self) -> Any:
        for number, data in super().__iter__():
            yield number, data * self.factor


def several(mode: str) -> CombinedLoader:
    parts = {
        "a": DataLoader(Numbers(), 4, shuffle=True),
        "b": [
            DataLoader(
                Numbers(10), 3, sampler=RandomSampler(range(10), generator=torch.Generator().manual_seed(2))
            ),
            DataLoader(StatefulStream(), 2),
        ],
    }
    return CombinedLoader(parts, mode)


def stateful(*args: Any, **kwargs: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

    return StatefulDataLoader(*args, **kwargs)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(Numbers(), 4, shuffle=True),
    "in order": lambda: DataLoader(Numbers(), 4, drop_last=True),
    "with a generator": lambda: DataLoader(
        Numbers(), 4, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "replacement": lambda: DataLoader(Numbers(), 4, sampler=RandomSampler(Numbers(), True, 30)),
    "weighted": lambda: DataLoader(Numbers(), 4, sampler=WeightedRandomSampler(range(COUNT), COUNT)),
    "subset": lambda: DataLoader(Numbers(), 4, sampler=SubsetRandomSampler(range(3, 20))),
    "drawing sampler": lambda: DataLoader(Numbers(), 4, sampler=Drawing()),
    "sampler without length": lambda: DataLoader(Numbers(), 4, sampler=Endless()),
    "sampler with generators": lambda: DataLoader(Numbers(), 4, sampler=OwnGenerators()),
    "counting sampler": lambda: DataLoader(Numbers(), 4, sampler=Counting()),
    "distributed sampler": lambda: DataLoader(
        Numbers(), 4, sampler=DistributedSampler(Numbers(), 1, 0, seed=3)
    ),
    "batch sampler": lambda: DataLoader(Numbers(), batch_sampler=Buckets()),
    "batch sampler without length": lambda: DataLoader(Numbers(), batch_sampler=Buckets(False)),
    "sampler in a batch sampler": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(Counting(), 4, True)
    ),
    "no collation": lambda: DataLoader(
        Numbers(), batch_size=None, sampler=BatchSampler(SequentialSampler(Numbers()), 4, False)
    ),
    "dataset with a generator": lambda: DataLoader(OwnGenerator(), 4, shuffle=True),
    "subclass": lambda: Subclass(0.5, Numbers(), 4, shuffle=True),
    "max_size_cycle": lambda: several("max_size_cycle"),
    "max_size": lambda: several("max_size"),
    "min_size": lambda: several("min_size"),
    "sequential": lambda: several("sequential"),
    "dict": lambda: {
        "a": DataLoader(Numbers(), 4, shuffle=True),
        "b": DataLoader(Numbers(9), 2, shuffle=True),
    },
    "dict of one": lambda: {"a": DataLoader(Numbers(), 4, shuffle=True)},
    "iterable with state": lambda: DataLoader(StatefulStream(), 4),
    "iterable with state and length": lambda: DataLoader(StatefulStream(True), 4),
    "iterable with inner state": lambda: DataLoader(InnerState(), 4),
    "iterable with inner state and length": lambda: DataLoader(InnerState(True), 1),
    "iterable with inner start": lambda: DataLoader(InnerStart(), 4),
    "iterator with state": lambda: DataLoader(StreamOfPlaces(), 4),
    "iterable": lambda: DataLoader(Stream(), 4),
    "iterable, no collation": lambda: DataLoader(Stream(True), batch_size=None),
    "handmade": Handmade,
    "handmade without length": lambda: Handmade(False),
    "handmade with state": HandmadeStateful,
    "handmade with state, no length": lambda: HandmadeStateful(False),
    "StatefulDataLoader": lambda: stateful(Numbers(), 4, shuffle=True),
    "StatefulDataLoader of an iterable": lambda: stateful(StatefulStream(), 4),
}
"""Each makes a new one, as a new process would."""

WITH_WORKERS: dict[str, Callable[[], Any]] = {
    "shuffle, workers": lambda: DataLoader(Numbers(), 4, shuffle=True, num_workers=2),
    "drawing sampler, workers": lambda: DataLoader(Numbers(), 4, sampler=Drawing(), num_workers=2),
    "batch sampler, workers": lambda: DataLoader(Numbers(), batch_sampler=Buckets(), num_workers=2),
    "subclass, workers": lambda: Subclass(0.5, Numbers(), 4, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        Numbers(), 4, sampler=OwnGenerators(), num_workers=2, persistent_workers=True
    ),
    "no collation, workers": lambda: DataLoader(Numbers(), batch_size=None, shuffle=True, num_workers=2),
    "iterable, workers": lambda: DataLoader(Stream(), 4, num_workers=2),
    "iterable with state, workers": lambda: DataLoader(StatefulStream(), 4, num_workers=2),
    "iterable with state, persistent workers": lambda: DataLoader(
        StatefulStream(), 4, num_workers=2, persistent_workers=True
    ),
    "iterator with state, workers": lambda: DataLoader(StreamOfPlaces(), 4, num_workers=2),
    "StatefulDataLoader of an iterable, workers": lambda: stateful(
        StatefulStream(), 4, num_workers=2, snapshot_every_n_steps=2
    ),
    "max_size_cycle, workers": lambda: CombinedLoader(
        [
            DataLoader(Numbers(), 4, shuffle=True, num_workers=1),
            DataLoader(StatefulStream(), 4, num_workers=2),
        ],
        "max_size_cycle",
    ),
}
