"""Every sample once, whatever the world size, the batch size, and where the run was cut."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from trainyard.data.sampler import Batch, EpochPlan

sizes = st.integers(min_value=1, max_value=97)


@st.composite
def plans(draw: st.DrawFn) -> EpochPlan:
    return EpochPlan(
        samples=draw(sizes), batch_size=draw(st.integers(1, 9)), world=draw(st.integers(1, 5)),
        accumulate=draw(st.integers(1, 4)),
    )  # fmt: skip


def gang(plan: EpochPlan, used: int = 0) -> list[tuple[Batch, ...]]:
    """The batches of all ranks side by side; strict: all ranks have equally many."""
    return list(zip(*(plan.iterate(rank, used) for rank in range(plan.world)), strict=True))


def own(batch: Batch) -> list[int]:
    return [] if batch.padding else list(batch.positions)


@given(plans())
def test_each_position_once_and_in_order(plan: EpochPlan) -> None:
    seen = [p for batches in gang(plan) for batch in batches for p in own(batch)]
    assert seen == list(range(plan.samples))


@given(plans())
def test_shares_differ_by_one_at_most_and_fit_the_batch_size(plan: EpochPlan) -> None:
    for batches in gang(plan):
        shares = [len(own(b)) for b in batches]
        assert max(shares) - min(shares) <= 1
        assert max(shares) <= plan.batch_size
        assert sum(shares) == batches[0].size


@given(plans())
def test_weighted_means_average_to_the_mean_over_the_samples_of_a_step(plan: EpochPlan) -> None:
    """With loss(position) = position: exact, in fractions."""
    total, expected = Fraction(0), []
    for batches in gang(plan):
        expected += [p for b in batches for p in own(b)]
        for batch in batches:
            mean = Fraction(sum(batch.positions), len(batch.positions))
            total += mean * batch.weight / plan.world
        assert len({b.steps for b in batches}) == 1
        if batches[0].steps:
            assert total == Fraction(sum(expected), len(expected))
            total, expected = Fraction(0), []
    assert expected == [], "the epoch ended in the middle of an optimizer step"


@given(plans(), plans(), st.data())
def test_another_world_goes_on_where_one_was_cut(
    first: EpochPlan, second: EpochPlan, data: st.DataObject
) -> None:
    first_steps = list(gang(first))
    ends = [b[0].end for b in first_steps if b[0].steps]
    cut = data.draw(st.sampled_from(ends))
    then = EpochPlan(
        samples=first.samples, batch_size=second.batch_size, world=second.world, accumulate=second.accumulate
    )
    seen = [p for batches in first_steps if batches[0].end <= cut for b in batches for p in own(b)]
    seen += [p for batches in gang(then, cut) for b in batches for p in own(b)]
    assert seen == list(range(first.samples))


@given(plans(), st.data())
def test_the_rest_of_an_epoch_is_the_same_after_a_resume(plan: EpochPlan, data: st.DataObject) -> None:
    whole = list(plan.iterate(0))
    cut = data.draw(st.sampled_from([0, *(b.end for b in whole if b.steps)]))
    assert list(plan.iterate(0, cut)) == [b for b in whole if b.start >= cut]
    assert plan.batches_from(cut) == len([b for b in whole if b.start >= cut])


@given(plans())
def test_only_the_last_batch_is_last(plan: EpochPlan) -> None:
    flags = [b.last for b in plan.iterate(0)]
    assert flags == [False] * (len(flags) - 1) + [True]


def test_drop_last_drops_what_does_not_fill_a_global_batch() -> None:
    plan = EpochPlan(samples=23, batch_size=3, world=2, drop_last=True)
    assert plan.usable == 18
    assert all(b.size == 6 for b in plan.iterate(0))
    assert EpochPlan(samples=23, batch_size=3, world=2).usable == 23


def test_limits_count_global_batches() -> None:
    assert EpochPlan(samples=100, batch_size=5, world=2, limit=3).usable == 30
    assert EpochPlan(samples=100, batch_size=5, world=2, limit=0.25).usable == 20
    assert EpochPlan(samples=100, batch_size=5, world=2, limit=1.0).usable == 100
    assert EpochPlan(samples=12, batch_size=5, world=1, limit=50).usable == 12


def test_a_rank_without_samples_joins_in_with_weight_zero() -> None:
    plan = EpochPlan(samples=9, batch_size=2, world=4)
    tail = list(plan.iterate(3))[-1]
    assert tail.padding
    assert tail.weight == 0
    assert list(tail.positions) == [8]


def test_a_full_window_weighs_as_lightning_does() -> None:
    plan = EpochPlan(samples=48, batch_size=2, world=4, accumulate=3)
    assert {b.weight for b in plan.iterate(1)} == {Fraction(1, 3)}
