"""How a step's samples are divided: by another number of ranks than the run began with, and by virtual ranks."""

from __future__ import annotations

import logging
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.data.batching import Batching
from trainyard.data.sampler import Batch, EpochPlan, rescaled
from trainyard.data.virtual import block, virtual_window
from trainyard.determinism import check_checkpoint, check_world, virtual_ranks
from trainyard.errors import MisconfigurationException
from trainyard.loops.schedule import Schedule
from trainyard.loops.state import LoopState


@st.composite
def moved(draw: st.DrawFn) -> tuple[EpochPlan, EpochPlan]:
    """The plan that a run began with, and that on another number of ranks."""
    size, origin, accumulate = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    samples = draw(st.integers(size * origin, 150))
    drop = draw(st.booleans())
    limit = draw(st.none() | st.integers(1, 5) | st.sampled_from([0.5, 0.9]))
    began = EpochPlan(
        samples=samples, batch_size=size, world=origin, accumulate=accumulate, drop_last=drop, limit=limit
    )
    now = EpochPlan(
        samples=samples, batch_size=size, world=draw(st.integers(1, 7)), accumulate=accumulate, drop_last=drop,
        limit=limit, origin=origin,
    )  # fmt: skip
    return began, now


def steps(plan: EpochPlan) -> list[list[Batch]]:
    """By step: the batches of all ranks."""
    found: list[list[Batch]] = [[]]
    for batches in zip(*(plan.iterate(rank) for rank in range(plan.world)), strict=True):
        found[-1] += batches
        if batches[0].steps:
            found.append([])
    assert not found[-1], "an epoch ends with a step"
    return found[:-1]


@given(moved())
def test_every_step_keeps_its_samples(plans: tuple[EpochPlan, EpochPlan]) -> None:
    began, now = plans
    assert (now.usable, now.steps) == (began.usable, began.steps)
    before, after = steps(began), steps(now)
    assert len(before) == len(after) == now.steps
    for old, new in zip(before, after, strict=True):
        assert Counter(i for b in old for i in range(b.low, b.high)) == Counter(
            i for b in new for i in range(b.low, b.high)
        )
        total = sum((Fraction(b.weight) for b in new), Fraction(0))
        assert total / now.world == 1, "the average over the ranks is the mean over the samples"
        samples = sum(b.high - b.low for b in new)
        for batch in new:
            assert Fraction(batch.weight) == Fraction((batch.high - batch.low) * now.world, samples)
            assert batch.high - batch.low <= now.batch_size, "memory for a batch, not for more"


@given(moved())
def test_lengths_agree_with_what_is_given(plans: tuple[EpochPlan, EpochPlan]) -> None:
    _, now = plans
    batches = list(now.iterate(0))
    assert now.batches_from(0) == len(batches)
    for number, batch in enumerate(batches):
        if batch.steps:
            assert now.batches_from(batch.end) == len(batches) - number - 1
        if batch.end < now.usable - now.step_samples:
            assert now.used_after(number + 1) == batch.end


@given(moved())
def test_batches_of_a_step_are_of_one_size(plans: tuple[EpochPlan, EpochPlan]) -> None:
    """On another number of ranks: no remainder of a few samples, with which batch normalisation could not do."""
    _, now = plans
    if now.world == now.origin:
        return
    for step in steps(now):
        sizes = {b.size for b in step}
        assert max(sizes) - min(sizes) <= 1


@given(
    virtual=st.integers(1, 9), world=st.integers(1, 9), size=st.integers(1, 3), accumulate=st.integers(1, 3),
    samples=st.integers(1, 90),
)  # fmt: skip
def test_virtual_ranks_have_the_same_batches_in_any_division(
    virtual: int, world: int, size: int, accumulate: int, samples: int
) -> None:
    world = min(world, virtual)
    plan = EpochPlan(samples=samples, batch_size=size, world=virtual, accumulate=accumulate)

    def batches(processes: int) -> list[tuple[object, ...]]:
        found = []
        for rank in range(processes):
            own = list(
                plan.in_steps(lambda n, r=rank: virtual_window(plan, block(r, processes, virtual), n), 0)
            )
            assert sum(b.steps for b in own) == plan.steps, "every process steps as often"
            assert sum(b.counts for b in own) == plan.batches_from(0)
            assert [b.last for b in own] == [False] * (len(own) - 1) + [True]
            assert all(b.end <= samples and b.virtual is not None for b in own)
            found += [(b.start, b.virtual, b.turn, b.low, b.high, b.weight) for b in own if not b.padding]
        return sorted(found)  # type: ignore[type-var]

    assert batches(world) == batches(1)
    assert Counter(i for b in batches(world) for i in range(int(b[3]), int(b[4]))) == Counter(range(samples))  # type: ignore[call-overload]


def test_what_cannot_be_cut_is_rounded_up() -> None:
    assert [rescaled(2, 4, world) for world in (1, 2, 3, 4, 5, 8, 9)] == [8, 4, 3, 2, 2, 1, 1]


def test_validation_keeps_its_places() -> None:
    """Every 2 batches of 4 ranks are every 8 of one."""
    schedule = Schedule(max_epochs=1, max_steps=-1, val_check_interval=2)
    due = [
        n for n in range(1, 25)
        if schedule.validates_within(LoopState(batches=n), batches=24, last=False, scale=Fraction(4))
    ]  # fmt: skip
    assert due == [8, 16, 24]
    whole = LoopState(batches=24, total_batches=24)
    assert schedule.validates_at_end(whole, complete=True, should_stop=False, scale=Fraction(4))
    at_once = LoopState(batches=3, total_batches=3)
    assert schedule.validates_within(at_once, batches=9, last=False, counts=2), (
        "the second batch is among them"
    )
    assert not schedule.validates_within(at_once, batches=9, last=False, counts=1)
    assert not schedule.validates_within(LoopState(batches=2), batches=9, last=False, counts=0)


def test_batching_goes_into_checkpoints_and_back() -> None:
    state = LoopState(step=3, batching=Batching(ranks=4, batch_size=None, accumulate=2, counted_at=3))
    back = LoopState.from_state(state.state_dict())
    assert back.batching == Batching(ranks=4, batch_size=None, accumulate=2, counted_at=3, loaded=True)
    assert LoopState.from_state({"step": 3}).batching is None


# ---- what is asked for


def test_arguments_and_the_environment() -> None:
    run = {"TRAINYARD_DETERMINISM": "elastic", "TRAINYARD_VIRTUAL_RANKS": "8"}
    assert virtual_ranks(None, None, {}) is None
    assert virtual_ranks(True, None, {}) is None
    assert virtual_ranks("elastic", 12, {}) == 12
    assert virtual_ranks(None, None, run) == 8


def test_the_training_run_wins(caplog: pytest.LogCaptureFixture) -> None:
    run = {"TRAINYARD_DETERMINISM": "elastic", "TRAINYARD_VIRTUAL_RANKS": "8"}
    with caplog.at_level(logging.WARNING):
        assert virtual_ranks("elastic", 12, run) == 8
    assert "virtual_ranks=12" in caplog.text


@pytest.mark.parametrize(
    ("deterministic", "given", "env", "message"),
    [
        ("elastic", None, {}, "virtual_ranks: None is not a positive integer"),
        ("elastic", 0, {}, "virtual_ranks: 0 is not a positive integer"),
        (True, 4, {}, "virtual_ranks: it says how a step is divided with deterministic='elastic'"),
        (None, None, {"TRAINYARD_DETERMINISM": "yes"}, "TRAINYARD_DETERMINISM: 'yes' is not 'elastic'"),
        (None, None, {"TRAINYARD_DETERMINISM": "elastic"}, "TRAINYARD_VIRTUAL_RANKS: '' is not a positive"),
    ],
)
def test_what_makes_no_sense_is_refused(
    deterministic: object, given: int | None, env: dict[str, str], message: str
) -> None:
    with pytest.raises(MisconfigurationException) as error:
        virtual_ranks(deterministic, given, env)
    assert message in str(error.value)


def test_too_many_processes_are_refused() -> None:
    check_world(4, 4)
    with pytest.raises(MisconfigurationException, match="start at most 4"):
        check_world(4, 5)


def test_an_elastic_checkpoint_holds_its_run_to_it() -> None:
    before = Batching(ranks=4, batch_size=2, accumulate=1, counted_at=4, virtual=True)
    check_checkpoint(before, before)
    check_checkpoint(Batching(ranks=3, batch_size=5, accumulate=1, counted_at=3), before)
    for change in ({"ranks": 5}, {"batch_size": 3}, {"accumulate": 2}):
        now = Batching(
            **{"ranks": 4, "batch_size": 2, "accumulate": 1, "counted_at": 4, "virtual": True, **change}
        )
        with pytest.raises(MisconfigurationException, match="would lead to other weights"):
            check_checkpoint(before, now)
