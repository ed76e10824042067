"""Young's interval, the life of a run out of its log, and that both together lose little more than the best of all intervals."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.costs import Costs
from trainyard.checkpoint.interval import (
    CEILING_SECONDS,
    LEAST_SECONDS,
    PRIOR_SECONDS,
    STALL_SHARE,
    Life,
    choose,
    life_of,
    young,
)
from trainyard.checkpoint.triggers import Triggers
from trainyard.peers import Alone
from trainyard_api.checkpoints import Record, Shard, shard_key

seconds = st.floats(1e-4, 1e4)
hours = st.floats(1.0, 1e7)


def fence(attempt: int, seq: int, time: float) -> Record:
    return Record(kind="fence", seq=seq, run="r", attempt=attempt, step=0, time=time)


def commit(attempt: int, seq: int, time: float, *, life: Life | None = None, reason: str = "auto") -> Record:
    found = life or Life()
    return Record(
        kind="commit", seq=seq, run="r", attempt=attempt, step=seq, time=time, world_size=1, reason=reason,
        shards=[Shard(key=shard_key(seq, attempt, 0, 1), rank=0, size=1, sha256="0" * 64)],
        alive_seconds=found.seconds, failures=found.failures,
    )  # fmt: skip


@given(seconds, st.floats(0, 1e4), hours, st.floats(10, 1e5))
def test_bounds_hold_whatever_was_measured(stall: float, commit: float, mttf: float, ceiling: float) -> None:
    choice = choose(stall=stall, commit=commit, mttf=mttf, ceiling=ceiling)
    assert choice.seconds >= commit
    assert choice.seconds >= LEAST_SECONDS
    assert stall / choice.seconds <= STALL_SHARE * (1 + 1e-9)
    floor = max(commit, LEAST_SECONDS, stall / STALL_SHARE)
    assert choice.seconds <= max(ceiling, floor)
    if not choice.bound:
        assert choice.seconds == young(stall, mttf)


@given(seconds, seconds, hours, hours)
def test_dearer_saves_and_rarer_failures_make_it_longer(a: float, b: float, m: float, n: float) -> None:
    low, high = sorted((a, b))
    assert choose(stall=low, commit=0, mttf=m).seconds <= choose(stall=high, commit=0, mttf=m).seconds
    low, high = sorted((m, n))
    assert choose(stall=a, commit=0, mttf=low).seconds <= choose(stall=a, commit=0, mttf=high).seconds


@given(st.floats(1e-3, 10), st.floats(1e4, 1e7))
def test_where_youngs_formula_decides_dalys_higher_order_form_is_the_same(stall: float, mttf: float) -> None:
    choice = choose(stall=stall, commit=0, mttf=mttf)
    if choice.bound:
        return
    x = (stall / (2 * mttf)) ** 0.5
    daly = choice.seconds * (1 + x / 3 + x * x / 9) - stall
    assert daly == pytest.approx(choice.seconds, rel=0.007)


@given(st.floats(0.01, 5), st.floats(1e4, 1e6), st.floats(0.2, 5))
def test_no_other_interval_costs_less(stall: float, mttf: float, factor: float) -> None:
    def cost(interval: float) -> float:
        return stall / interval + interval / (2 * mttf)

    best = young(stall, mttf)
    assert cost(best) <= cost(best * factor) * (1 + 1e-9)


def test_reasons_are_said() -> None:
    assert "at most 1% of the time" in choose(stall=10, commit=1, mttf=3600).bound
    assert "is committed" in choose(stall=0.01, commit=300, mttf=3600).bound
    assert str(int(CEILING_SECONDS)) in choose(stall=1, commit=1, mttf=1e9).bound
    assert not choose(stall=0.5, commit=1, mttf=PRIOR_SECONDS).bound


# ---- the life of a run


def test_a_young_run_has_the_prior() -> None:
    assert life_of([], now=1000.0) == Life()
    assert Life().mttf == PRIOR_SECONDS


def test_a_commit_carries_the_life_so_that_what_is_pruned_is_not_missed() -> None:
    records = [commit(7, 40, 1000.0, life=Life(9e5, 6)), fence(8, 41, 1200.0)]
    life = life_of(records, now=1300.0, ceiling=600.0)
    assert life.failures == 6 + 2, "attempts 7 and 8 are over"
    assert life.seconds == 9e5 + 200 + 100


@pytest.mark.parametrize("reason", ["stop", "exception", "end"])
def test_an_attempt_that_saved_at_its_end_is_no_failure(reason: str) -> None:
    records = [fence(1, 1, 0.0), commit(1, 2, 500.0, life=Life(500.0, 0), reason=reason)]
    assert life_of(records, now=1e6) == Life(500.0, 0)


def test_a_suspension_does_not_count_as_life() -> None:
    records = [fence(1, 1, 0.0), commit(1, 2, 300.0), commit(1, 3, 360.0, life=Life(360.0, 0))]
    week = 7 * 86400.0
    life = life_of(records, now=week)
    assert life.seconds == 360.0 + 60.0, "at most what passed between its last two records"
    assert life_of([fence(1, 1, 0.0)], now=week).seconds == CEILING_SECONDS


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e6)), max_size=12), st.floats(0, 1e7))
def test_life_is_bounded_whatever_the_clocks_say(story: list[tuple[bool, float]], now: float) -> None:
    records: list[Record] = []
    attempt, fences = 0, 0
    for seq, (is_fence, time) in enumerate(story, start=1):
        if is_fence or attempt == 0:
            attempt, fences = attempt + 1, fences + 1
            records.append(fence(attempt, seq, time))
        else:
            records.append(commit(attempt, seq, time))
    for shuffled in (records, records[::-1]):
        life = life_of(shuffled, now=now)
        assert 0 <= life.seconds <= CEILING_SECONDS * max(fences, 1)
        assert 0 <= life.failures <= fences


# ---- what was measured


@given(st.lists(st.floats(0, 100), min_size=3, max_size=30), st.floats(1e3, 1e6))
def test_one_outlier_moves_what_is_usual_no_further_than_to_a_neighbour(
    seen: list[float], outlier: float
) -> None:
    costs = Costs()
    for value in [*seen, outlier]:
        costs.saw(value)
    assert costs.usual <= max(seen)


def test_the_first_save_counts_only_while_it_is_alone() -> None:
    costs = Costs()
    assert (costs.usual, costs.worst, bool(costs)) == (0.0, 0.0, False)
    costs.saw(5.0)
    assert costs.usual == 5.0
    costs.saw(0.1)
    assert costs.usual == 0.1
    assert costs.worst == 5.0


# ---- all together


STALL, COMMIT, MTTF, STEP, DOWN = 1.0, 3.0, 7200.0, 5.0, 60.0


class Simulation:
    """A run whose clock is a number: it fails at given moments of its life, and goes on from its newest commit."""

    def __init__(self, failures: list[float], **config: object) -> None:
        self.now = self.trained = self.stalls = self.redone = 0.0
        self.config = CheckpointConfig(uri="file:///nowhere", **config)  # type: ignore[arg-type]
        self.log: list[Record] = []
        for attempt, lives in enumerate(failures, start=1):
            self.attempt(attempt, lives)

    @property
    def lost(self) -> float:
        return self.stalls + self.redone

    def attempt(self, attempt: int, lives: float) -> None:
        triggers = Triggers(self.config, Alone(), lambda: self.now)
        triggers.resumed(0, self.log, now=self.now)
        end, kept, step = self.now + lives, self.now, 0
        in_flight: tuple[float, float] | None = None
        self.log.append(fence(attempt, len(self.log) + 1, self.now))
        while self.now < end:
            self.now += STEP
            step += 1
            if in_flight is not None and self.now >= in_flight[0]:
                kept, in_flight = in_flight[1], None
                triggers.committed(COMMIT)
                record = commit(attempt, self.log[-1].seq + 1, self.now, life=triggers.life)
                self.log = [*self.log[-3:], record]  # pruned, as in a bucket
            if triggers.due(step, epoch_end=False) and in_flight is None:
                begun = self.now
                self.now += STALL
                self.stalls += STALL
                triggers.saved(STALL)
                in_flight = (self.now + COMMIT, begun)
        self.redone += self.now - kept
        self.now += DOWN


def test_auto_loses_little_more_than_the_best_fixed_interval() -> None:
    dice = random.Random(20261123)
    failures = [dice.expovariate(1 / MTTF) for _ in range(250)]
    auto = Simulation(failures, auto=True)
    fixed = {
        s: Simulation(failures, every_n_seconds=s).lost for s in (15, 30, 60, 90, 120, 160, 240, 480, 960)
    }
    best = min(fixed, key=lambda s: fixed[s])
    assert 60 <= best <= 240, "Young's: 120 s"
    assert auto.lost <= 1.10 * fixed[best]
    assert auto.lost < fixed[15] / 1.5, "the intervals do differ"
    assert auto.lost < fixed[960] / 1.5
    measured = life_of(auto.log, now=auto.now)
    assert measured.failures == pytest.approx(len(failures), abs=3)
    assert measured.mttf == pytest.approx(MTTF, rel=0.25)


def test_days_of_suspension_do_not_make_it_careless() -> None:
    """The same failures, and a weekend between any two attempts."""
    dice = random.Random(5)
    lives = [dice.expovariate(1 / MTTF) for _ in range(40)]
    plain = Simulation(lives, auto=True)
    resting = Simulation([], auto=True)
    for attempt, life in enumerate(lives, start=1):
        resting.attempt(attempt, life)
        resting.now += 2.5 * 86400
    mttfs = [life_of(run.log, now=run.now).mttf for run in (plain, resting)]
    assert mttfs[1] == pytest.approx(mttfs[0], rel=0.1)
    assert list(itertools.islice((r.kind for r in reversed(resting.log)), 1)) == ["commit"]
