"""Whether a save can be committed in the seconds that are left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainyard.checkpoint.deadline import Deadline

costs = st.lists(st.tuples(st.floats(0, 30), st.floats(0, 300)), min_size=1, max_size=40)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(seen: list[tuple[float, float]], clock: Clock | None = None) -> Deadline:
    deadline = Deadline(clock or Clock())
    for stall, commit in seen:
        deadline.begun()
        deadline.saw(stall, commit, 1 << 20)
    return deadline


@given(costs, st.floats(0, 1000), st.floats(0, 1000))
def test_more_time_never_fits_less(seen: list[tuple[float, float]], a: float, b: float) -> None:
    deadline = told(seen)
    low, high = sorted((a, b))
    assert deadline.fits(high) or not deadline.fits(low)


@given(costs)
def test_what_was_seen_decides(seen: list[tuple[float, float]]) -> None:
    deadline = told(seen)
    slowest = max(s for s, _ in seen) + max(c for _, c in seen)
    assert deadline.fits(slowest * 1.2 + 1)
    assert deadline.needs(1 << 40) == deadline.needs(0), (
        "once there are measures, nothing is guessed from the size"
    )
    newest = seen[-20:]
    assert deadline.needs() >= sorted(s for s, _ in newest)[len(newest) // 2]


def test_one_outage_among_twenty_saves_is_forgotten() -> None:
    deadline = told([(0.1, 1.0)] * 10 + [(0.1, 500.0)] + [(0.1, 1.0)] * 9)
    assert deadline.fits(3.0)
    assert not told([(0.1, 1.0), (0.1, 500.0)]).fits(30.0), "one of two may be the next one"


def test_before_the_first_save_its_size_tells() -> None:
    deadline = Deadline(Clock())
    assert deadline.fits(1.0, size=1 << 20)
    assert not deadline.fits(8.0, size=4 << 30)
    plan = deadline.plan(8.0, size=4 << 30)
    assert not plan.saves
    assert "as far as its size tells" in plan.why


def test_the_save_in_flight_is_seen_through_first() -> None:
    clock = Clock()
    deadline = told([(1.0, 10.0)], clock)
    deadline.begun()
    clock.now += 8.0
    assert deadline.plan(20.0).saves, "2 s for that one, 11 s for this one"
    assert deadline.plan(20.0).awaits
    clock.now -= 6.0
    plan = deadline.plan(20.0)
    assert (plan.saves, plan.awaits) == (False, True)
    assert "11.0 s" in plan.why
    assert "18.0 s are left" in plan.why
    assert "8.0 s" in plan.why
    tight = deadline.plan(5.0)
    assert (tight.saves, tight.awaits) == (False, False)
    deadline.dropped()
    assert deadline.plan(20.0).saves
    assert not deadline.plan(20.0).awaits


def test_a_save_that_is_overdue_is_waited_for() -> None:
    clock = Clock()
    deadline = told([(0.1, 1.0)], clock)
    deadline.begun()
    clock.now += 60.0
    plan = deadline.plan(1.0)
    assert plan.awaits
    assert not plan.saves
