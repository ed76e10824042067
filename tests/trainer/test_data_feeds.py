"""Feeds without a Trainer: ranks side by side, limits, lengths, what is kept of a user's loader."""

from __future__ import annotations

import gc
import itertools
import pickle
import random
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from tests.trainer.loaders import (
    COUNT,
    Buckets,
    Counting,
    Drawing,
    Endless,
    Handmade,
    HandmadeStateful,
    Numbers,
    OwnGenerators,
    StatefulStream,
    Stream,
)
from trainyard.data.feed import Feed
from trainyard.data.make import make_feed
from trainyard.data.once import _said
from trainyard.errors import MisconfigurationException
from trainyard.utilities.combined_loader import CombinedLoader


class Plain(Numbers):
    """A sample is its number."""

    def __getitem__(self, number: Any) -> Any:
        return torch.tensor(number)


class Shuffled(Sampler[int]):
    """Every number once, drawn lazily."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        left = list(range(self.count))
        while left:
            yield left.pop(random.randrange(len(left)))


class Unsized(Shuffled):
    def __len__(self) -> int:
        raise TypeError("no length")


class Batches(Sampler[list[int]]):
    """Every number once, in batches of two."""

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[list[int]]:
        numbers = iter(Shuffled())
        while batch := list(itertools.islice(numbers, 2)):
            yield batch


ONCE: dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(Plain(), 3, shuffle=True),
    "in order": lambda: DataLoader(Plain(), 3),
    "sampler": lambda: DataLoader(Plain(), 3, sampler=Shuffled()),
    "without length": lambda: DataLoader(Plain(), 3, sampler=Unsized()),
    "counting": lambda: DataLoader(Plain(), 3, sampler=Counting()),
    "subset": lambda: DataLoader(Plain(), 3, sampler=SubsetRandomSampler(range(COUNT))),
    "generator": lambda: DataLoader(Plain(), 3, shuffle=True, generator=torch.Generator().manual_seed(2)),
    "batch sampler": lambda: DataLoader(Plain(), batch_sampler=Batches()),
    "no collation": lambda: DataLoader(Plain(), batch_size=None, sampler=Shuffled()),
}


def feeds(make: Callable[[], Any], world: int, **options: Any) -> list[Feed]:
    return [make_feed(make(), rank=rank, world=world, seed=5, **options) for rank in range(world)]


def side_by_side(gang: list[Feed], epoch: int = 0, used: int = 0) -> list[tuple[tuple[Any, Any], ...]]:
    """Strict: all ranks have equally many batches."""
    return list(zip(*(feed.iterate(epoch, used) for feed in gang), strict=True))


def own(plan: Any, data: Any) -> list[Any]:
    return [] if plan.padding else torch.as_tensor(data).reshape(-1).tolist()


def numbers(steps: list[tuple[tuple[Any, Any], ...]]) -> Tally[int]:
    return Tally(n for ranks in steps for plan, data in ranks for n in own(plan, data))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", ONCE)
def test_all_ranks_together_use_each_sample_once(name: str, world: int) -> None:
    gang = feeds(ONCE[name], world, accumulate=2)
    orders = []
    for epoch in range(2):
        steps = side_by_side(gang, epoch)
        assert numbers(steps) == Tally(range(COUNT))
        assert [ranks[0][0].last for ranks in steps] == [False] * (len(steps) - 1) + [True]
        assert {len({plan.steps for plan, _ in ranks}) for ranks in steps} == {1}
        orders.append([own(*part) for ranks in steps for part in ranks])
    assert (orders[0] == orders[1]) == (name == "in order")


@pytest.mark.parametrize("name", ONCE)
def test_another_world_goes_on_where_one_was_cut(name: str) -> None:
    first = feeds(ONCE[name], 2)
    steps = list(itertools.islice(zip(*(feed.iterate(1, 0) for feed in first), strict=True), 2))
    then = feeds(ONCE[name], 3)
    for feed in then:
        feed.load_state(first[0].state(), moved=True)
    rest = side_by_side(then, 1, steps[-1][0][0].end)
    assert numbers(steps) + numbers(rest) == Tally(range(COUNT))


@pytest.mark.parametrize("name", ["batch sampler", "no collation"])
def test_batches_of_the_users_count_alike(name: str) -> None:
    """Averaged over the ranks, the weights of a step add up to one; a rank without a batch has none."""
    total = Fraction(0)
    for ranks in side_by_side(feeds(ONCE[name], 5, accumulate=2)):
        shares = {plan.weight for plan, _ in ranks if not plan.padding}
        assert len(shares) == 1
        assert all(plan.weight == 0 for plan, _ in ranks if plan.padding)
        total += sum((Fraction(plan.weight) for plan, _ in ranks), Fraction(0)) / 5
        if ranks[0][0].steps:
            assert total == 1
            total = Fraction(0)
    assert total == 0


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_sampler_without_a_length_is_planned_like_one_with(
    count: int, batch: int, world: int, accumulate: int, drop_last: bool
) -> None:
    def plans(kind: Any) -> list[Any]:
        make = lambda: DataLoader(Plain(count), batch, sampler=kind(count), drop_last=drop_last)  # noqa: E731
        steps = side_by_side(feeds(make, world, accumulate=accumulate))
        return [[(plan, own(plan, data)) for plan, data in ranks] for ranks in steps]

    assert plans(Unsized) == plans(Shuffled)


def test_distributed_samplers_of_the_users_repeat_nothing() -> None:
    """Each global batch has the samples that torch's would have, and the tail none twice."""
    gang = [
        make_feed(
            DataLoader(Plain(), 3, sampler=DistributedSampler(Plain(), 2, rank, seed=4)),
            rank=rank, world=2, seed=5,
        )
        for rank in range(2)
    ]  # fmt: skip
    steps = side_by_side(gang, 3)
    assert numbers(steps) == Tally(range(COUNT))
    theirs: list[DistributedSampler[int]] = [
        DistributedSampler(Plain(), 2, rank, seed=4) for rank in range(2)
    ]
    for sampler in theirs:
        sampler.set_epoch(3)
    batches = [list(BatchSampler(sampler, 3, False)) for sampler in theirs]
    for n, ranks in enumerate(steps[:-1]):
        assert numbers([ranks]) == Tally(batches[0][n] + batches[1][n])


class Striding(Sampler[int]):
    """Divides itself, with DistributedSampler's attributes and nothing else of it."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.num_replicas = rank, world

    def __len__(self) -> int:
        return len(range(self.rank, COUNT - 1, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(COUNT - 1)[self.rank :: self.num_replicas].tolist())


def test_a_sampler_that_divides_itself_is_not_divided_again() -> None:
    """And the ranks' generators agree while it draws."""
    gang = []
    for rank in range(2):
        gang.append(make_feed(DataLoader(Plain(), 4, sampler=Striding(rank, 2)), rank=rank, world=2, seed=5))
    orders = []
    for feed in gang:
        torch.manual_seed(random.randrange(1000))
        orders.append(list(feed.iterate(0, 0)))
    steps = list(zip(*orders, strict=True))
    assert numbers(steps) == Tally(range(COUNT - 1))
    assert [ranks[0][0].end for ranks in steps] == [8, 16, 22], "positions are of all ranks"


def test_without_the_distributed_sampler_every_rank_has_it_all() -> None:
    for feed in feeds(ONCE["shuffle"], 2, resample=False):
        assert Tally(n for plan, data in feed.iterate(0, 0) for n in own(plan, data)) == Tally(range(COUNT))


def test_parts_of_one_length_are_not_shuffled_alike() -> None:
    pair = {"a": DataLoader(Plain(), 4, shuffle=True), "b": DataLoader(Plain(), 4, shuffle=True)}
    feed = make_feed(pair, rank=0, world=1, seed=5)
    read = [data for _, data in feed.iterate(0, 0)]
    assert set(read[0]) == {"a", "b"}
    assert any(data["a"].tolist() != data["b"].tolist() for data in read)
    for name in ("a", "b"):
        assert Tally(n for data in read for n in data[name].tolist()) == Tally(range(COUNT))


@pytest.mark.parametrize(
    ("mode", "batches"), [("max_size_cycle", 8), ("max_size", 8), ("min_size", 3), ("sequential", 11)]
)
def test_modes(mode: str, batches: int) -> None:
    """As iterating the CombinedLoader itself, which is as Lightning's."""
    combined = CombinedLoader([DataLoader(Plain(), 3), (DataLoader(Plain(7), 3),)], mode)
    feed = make_feed(combined, rank=0, world=1, seed=5, accumulate=3)
    read = list(feed.iterate(0, 0))
    direct = list(combined)
    assert repr([data for _, data in read]) == repr([batch for batch, _, _ in direct])
    assert len(read) == batches == feed.batches == len(combined)
    assert [plan.last for plan, _ in read] == [False] * (batches - 1) + [True]
    assert [plan.steps for plan, _ in read] == [(n + 1) % 3 == 0 or n + 1 == batches for n in range(batches)]
    total = sum(Fraction(plan.weight) for plan, _ in read)
    assert total == -(-batches // 3), "each step's weights add up to one"


def test_a_cycle_begins_anew_in_another_order() -> None:
    parts = [DataLoader(Plain(), 2), DataLoader(Plain(4), 2, shuffle=True)]
    read = [data[1].tolist() for _, data in make_feed(parts, rank=0, world=1, seed=5).iterate(0, 0)]
    cycles = [read[n] + read[n + 1] for n in range(0, 12, 2)]
    assert all(sorted(cycle) == [0, 1, 2, 3] for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size", "sequential"])
def test_a_collection_goes_on_in_another_world(mode: str) -> None:
    """The parts go on where they were, each for itself."""

    def make() -> Any:
        return CombinedLoader(
            [DataLoader(Plain(40), 4, shuffle=True), DataLoader(Plain(30), 2, shuffle=True)], mode
        )

    def of(steps: Any, part: int) -> list[int]:
        parts = [data[part] for ranks in steps for _, data in ranks]
        return [n for data in parts if data is not None for n in data.tolist()]

    first = feeds(make, 2)
    steps = list(itertools.islice(zip(*(feed.iterate(0, 0) for feed in first), strict=True), 2))
    then = feeds(make, 1)
    then[0].load_state(first[0].state(), moved=True)
    rest = side_by_side(then, 0, steps[-1][0][0].end)
    if mode == "sequential":
        seen = Tally(n for ranks in steps + rest for _, data in ranks for n in data.tolist())
        assert seen == Tally(range(40)) + Tally(range(30))
        return
    assert len(of(steps, 0)) == 16, "and 24 are left, in six batches of one rank"
    assert Tally(of(steps, 0)) + Tally(of(rest[:6], 0)) == Tally(range(40))
    assert len(of(steps, 1)) == 8
    assert not Tally(of(steps, 1)) & Tally(of(rest[:11], 1))


# ---- lengths and limits


@pytest.mark.parametrize(("limit", "batches"), [(None, 8), (3, 3), (0.5, 4), (1.0, 8), (50, 8), (0, 0)])
def test_limits(limit: Any, batches: int) -> None:
    for name in ("shuffle", "sampler"):
        feed = make_feed(ONCE[name](), rank=0, world=1, seed=5, limit=limit)
        assert feed.batches == batches == len(list(feed.iterate(0, 0)))


def test_limits_of_what_has_no_length() -> None:
    for make in (lambda: DataLoader(Stream(), 4), ONCE["without length"], lambda: Handmade(False)):
        assert make_feed(make(), rank=0, world=1, seed=5).batches is None
        assert make_feed(make(), rank=0, world=1, seed=5, limit=1.0).batches is None
        feed = make_feed(make(), rank=0, world=1, seed=5, limit=4, accumulate=3)
        read = [plan for plan, _ in feed.iterate(0, 0)]
        assert feed.batches == len(read) == 4
        assert [plan.last for plan in read] == [False, False, False, True]
        with pytest.raises(MisconfigurationException, match=r"limit_val_batches=0\.5: a fraction"):
            make_feed(make(), rank=0, world=1, seed=5, limit=0.5, what="val")


def test_no_more_is_read_than_the_limit() -> None:
    read = []

    def endless() -> Iterator[int]:
        for n in itertools.count():
            read.append(n)
            yield n

    class Endlessly:
        def __iter__(self) -> Iterator[int]:
            return endless()

    feed = make_feed(Endlessly(), rank=0, world=1, seed=5, limit=3)
    assert [data for _, data in feed.iterate(0, 0)] == read == [0, 1, 2]


def test_accumulation_may_change_between_epochs() -> None:
    for make in (
        ONCE["shuffle"],
        ONCE["batch sampler"],
        Handmade,
        lambda: [DataLoader(Plain(), 3), DataLoader(Plain())],
    ):
        feed = make_feed(make(), rank=0, world=1, seed=5)
        assert all(plan.steps and plan.weight == 1 for plan, _ in feed.iterate(0, 0))
        feed.accumulate = 4
        plans = [plan for plan, _ in feed.iterate(1, 0)]
        assert [plan.steps for plan in plans[:4]] == [False, False, False, True]


def test_a_length_that_is_not_true_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    class Liar(Handmade):
        def __len__(self) -> int:
            return 9

    _said.clear()
    list(make_feed(Liar(), rank=0, world=1, seed=5).iterate(0, 0))
    assert "its length is 9, but it gave 6 batches" in caplog.text


# ---- evaluation


def test_indices_are_those_of_the_batch() -> None:
    for make in ONCE.values():
        for feed in feeds(make, 3, what="predict"):
            for plan, data in feed.iterate(0, 0):
                assert feed.indices(plan) == own(plan, data)
    for feed in feeds(lambda: DataLoader(Plain(), 3, num_workers=2), 2, what="predict"):
        for plan, data in feed.iterate(0, 0):
            assert feed.indices(plan) == own(plan, data)


def test_shuffled_evaluation_is_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    _said.clear()
    for _ in range(2):
        make_feed(ONCE["shuffle"](), rank=0, world=1, seed=5, what="val")
        make_feed(ONCE["in order"](), rank=0, world=1, seed=5, what="val")
        make_feed(ONCE["shuffle"](), rank=0, world=1, seed=5)
    assert [r.getMessage() for r in caplog.records] == [
        "the val DataLoader shuffles; that costs comparability from one evaluation to the next: shuffle=False"
    ]


# ---- what is kept of the user's loader


class Described(Numbers):
    def __getitem__(self, number: Any) -> Any:
        info = get_worker_info()
        return torch.tensor(
            [number, -1 if info is None else info.id, torch.get_num_threads(), int(self.opened)]
        )

    opened = False


def opens(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Described), "the user's function sees the user's dataset"
    assert info.id == worker
    info.dataset.opened = True


def as_list(samples: list[Any]) -> list[Any]:
    return samples


def test_loader_options_are_carried_over() -> None:
    loader = DataLoader(
        Described(), 3, num_workers=2, worker_init_fn=opens, collate_fn=as_list, prefetch_factor=3, timeout=50,
        multiprocessing_context="fork", persistent_workers=True,
    )  # fmt: skip
    feed = make_feed(loader, rank=0, world=1, seed=5)
    made: Any = feed._loader  # type: ignore[attr-defined]
    for name in (
        "prefetch_factor",
        "timeout",
        "multiprocessing_context",
        "persistent_workers",
        "num_workers",
        "pin_memory",
    ):
        assert getattr(made, name) == getattr(loader, name), name
    for epoch in range(2):
        read = [data for _, data in feed.iterate(epoch, 0)]
        assert all(isinstance(batch, list) for batch in read)
        rows = torch.stack([row for batch in read for row in batch])
        assert rows[:, 0].tolist() == list(range(COUNT))
        assert set(rows[:, 1].tolist()) == {0, 1}
        assert rows[:, 3].all()
    workers = list(made._iterator._workers)
    assert all(worker.is_alive() for worker in workers), "persistent_workers"
    made._iterator = None
    for worker in workers:
        worker.join(10)


def test_batches_are_in_order_whatever_the_loader_says(caplog: pytest.LogCaptureFixture) -> None:
    _said.clear()
    feed = make_feed(DataLoader(Plain(), 3, num_workers=2, in_order=False), rank=0, world=1, seed=5)
    assert [n for _, data in feed.iterate(0, 0) for n in data.tolist()] == list(range(COUNT))
    assert "in_order=False" in caplog.text


def test_what_workers_get_can_be_pickled() -> None:
    """They may be spawned."""
    for loader in (DataLoader(Numbers(), 3, num_workers=1), DataLoader(StatefulStream(), 3, num_workers=1)):
        made: Any = make_feed(loader, rank=0, world=1, seed=5)._loader  # type: ignore[attr-defined]
        copy, *_ = pickle.loads(pickle.dumps((made.dataset, made.worker_init_fn, made.collate_fn)))  # noqa: S301
        assert type(copy.dataset) is type(loader.dataset)


class Twice(DataLoader[Any]):
    """Gives every batch twice, as loaders for repeated augmentation do."""

    def __len__(self) -> int:
        return 2 * super().__len__()

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch
            yield batch


def test_a_subclass_that_goes_its_own_way_is_refused_and_can_be_read_as_it_is() -> None:
    feed = make_feed(Twice(Plain(), 4), rank=0, world=1, seed=5)
    with pytest.raises(MisconfigurationException, match=r"Twice.*use_distributed_sampler=False"):
        list(feed.iterate(0, 0))
    feed = make_feed(Twice(Plain(), 4), rank=0, world=1, seed=5, resample=False)
    assert len(list(feed.iterate(0, 0))) == 12


def test_iterating_leaves_the_generators_alone() -> None:
    """A sampler of the user's, or a loader without indices, draws, and training does not notice."""
    import numpy as np

    for make in (
        lambda: DataLoader(Plain(), 3, sampler=Drawing()), lambda: DataLoader(Plain(), 3, sampler=Endless()),
        lambda: DataLoader(Plain(), batch_sampler=Buckets()), lambda: DataLoader(Stream(), 3), Handmade,
        lambda: DataLoader(Plain(), 3, sampler=WeightedRandomSampler(range(COUNT), COUNT)),
        lambda: DataLoader(Plain(), 3, sampler=OwnGenerators()), lambda: DataLoader(Plain(), 3, shuffle=True),
    ):  # fmt: skip
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        list(make_feed(make(), rank=0, world=1, seed=5).iterate(0, 0))
        drawn = torch.rand(1).item(), random.random(), np.random.rand()
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())


# ---- the state of feeds that are not followed by an epoch's number


EVALUATED: dict[str, Callable[[], Any]] = {
    "sampler": lambda: DataLoader(Plain(), 3, sampler=OwnGenerators()),
    "counting": lambda: DataLoader(Plain(), 3, sampler=Counting()),
    "stream": lambda: DataLoader(StatefulStream(), 3),
    "handmade": HandmadeStateful,
    "collection": lambda: CombinedLoader(
        [DataLoader(Plain(), 3, sampler=Counting()), HandmadeStateful()], "min_size"
    ),
}


@pytest.mark.parametrize("name", EVALUATED)
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_evaluation_goes_on_with_the_next_round(name: str, rounds: int) -> None:
    """It iterates epoch 0 again and again; what a sampler remembers moves on all the same."""

    def read(feed: Feed) -> str:
        return repr([data for _, data in feed.iterate(0, 0)])

    old = make_feed(EVALUATED[name](), rank=0, world=1, seed=5)
    for _ in range(rounds):
        read(old)
    state = old.state()
    new = make_feed(EVALUATED[name](), rank=0, world=1, seed=5)
    new.load_state(state)
    assert repr(new.state()) == repr(state), "a save right after a resume"
    assert [read(new) for _ in range(2)] == [read(old) for _ in range(2)]


# ---- streams on several ranks


def test_ranks_shuffle_alike_unless_workers_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that shuffles by the global generators and takes its rank's part needs that."""

    def drawn(rank: int) -> str:
        return repr([data for _, data in make_feed(Handmade(), rank=rank, world=2, seed=5).iterate(0, 0)])

    assert drawn(0) == drawn(1)
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    assert drawn(0) != drawn(1)


def test_a_stream_in_another_world_says_that_it_is_not_exact(caplog: pytest.LogCaptureFixture) -> None:
    _said.clear()
    gang = feeds(HandmadeStateful, 2)
    steps = list(itertools.islice(zip(*(feed.iterate(0, 0) for feed in gang), strict=True), 2))
    used = steps[-1][0][0].end
    assert used == 4, "batches of all ranks"
    alone = make_feed(HandmadeStateful(), rank=0, world=1, seed=5)
    alone.load_state(gang[0].state(), moved=True)
    rest = [plan for plan, _ in alone.iterate(0, used)]
    assert [plan.end for plan in rest] == [5, 6]
    assert "another one since the last checkpoint" in caplog.text


@pytest.mark.parametrize("data", [Plain(), StatefulStream()], ids=["map-style", "iterable"])
def test_closing_ends_workers_that_live_from_epoch_to_epoch(data: Any) -> None:
    feed = make_feed(DataLoader(data, 3, num_workers=1, persistent_workers=True), rank=0, world=1, seed=5)
    batches = feed.iterate(0, 0)
    next(batches)
    (worker,) = feed._loader._iterator._workers  # type: ignore[attr-defined]
    batches.close()  # type: ignore[attr-defined]
    assert worker.is_alive()
    gc.disable()  # nobody has to collect them
    try:
        feed.close()
    finally:
        gc.enable()
    assert not worker.is_alive()
