"""The coordinator's memory: who is rung, who is woken, who is told to go."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.clock import FakeClock, settle
from trainyard_api.protocol import (
    Action,
    AgentPhase,
    Beat,
    Checkpoint,
    Directive,
    Failure,
    Progress,
    Resumed,
)
from trainyard_operator.coordinator.registry import NOT_A_MEMBER, Answer, Registry, SupersededError

RUN = "run-uid"
HOLD = Directive(action=Action.HOLD, attempt=1)
GO = Directive(action=Action.RUN, attempt=1, nodes=2, procs_per_node=1, master_addr="10.0.0.1")


def beat(pod: str = "a", **changes: object) -> Beat:
    return replace(
        Beat(pod_name=f"name-{pod}", pod_uid=pod, incarnation="one", node_index=0),
        **changes,  # type: ignore[arg-type]
    )


class Setup:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.rings: list[str] = []
        self.registry = Registry(on_change=self.rings.append, clock=self.clock)


@pytest.fixture
def setup() -> Setup:
    return Setup()


@pytest.mark.parametrize(
    "change",
    [
        {"phase": AgentPhase.STARTING},
        {"attempt": 1},
        {"ready": True},
        {"failure": Failure(attempt=1, exit_code=1)},
        {"checkpoint": Checkpoint(step=1, seq=1, uri="s3://b/c", time=1.0)},
        {"resumed": Resumed(attempt=1, step=3)},
        {"incarnation": "two"},
        {"pod_ip": "10.0.0.9"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_may_change_a_decision_rings_at_once_and_once(setup: Setup, change: dict[str, object]) -> None:
    setup.registry.hear(RUN, beat())
    assert setup.rings == [RUN], "the first beat rings"
    setup.registry.hear(RUN, beat())
    assert setup.rings == [RUN], "the same again does not"
    setup.registry.hear(RUN, beat(**change))
    assert setup.rings == [RUN, RUN]
    setup.registry.hear(RUN, beat(**change))
    assert setup.rings == [RUN, RUN]


def test_progress_rings_at_most_once_a_second_for_the_whole_run(setup: Setup) -> None:
    for pod in "abc":
        setup.registry.hear(RUN, beat(pod))
    setup.rings.clear()
    for step in range(40):  # 4 seconds, three agents at 10 beats a second
        setup.clock.now += 0.1
        for pod in "abc":
            setup.registry.hear(RUN, beat(pod, progress=Progress(step=step)))
    assert 3 <= len(setup.rings) <= 4
    assert setup.registry.members(RUN)["b"].beat.progress == Progress(step=39)
    assert setup.registry.members(RUN)["b"].received == setup.clock.now


def test_another_commit_is_told_once_by_each_agent() -> None:
    told: list[tuple[str, int]] = []
    registry = Registry(
        on_change=lambda uid: None,
        clock=FakeClock(),
        on_commit=lambda uid, commit: told.append((uid, commit.seq)),
    )
    first, second = (Checkpoint(step=n, seq=n, uri="s3://b/c", time=1.0) for n in (1, 2))
    registry.hear(RUN, beat(checkpoint=first))
    registry.hear(RUN, beat(checkpoint=first, attempt=1))
    registry.hear(RUN, beat("b"))
    registry.hear(RUN, beat("b", checkpoint=first))
    registry.hear(RUN, beat(checkpoint=second))
    assert told == [(RUN, 1), (RUN, 1), (RUN, 2)]


def test_an_old_agent_process_is_refused_after_a_new_one_was_heard(setup: Setup) -> None:
    setup.registry.hear(RUN, beat(incarnation="one"))
    setup.registry.hear(RUN, beat(incarnation="two"))
    with pytest.raises(SupersededError):
        setup.registry.hear(RUN, beat(incarnation="one", phase=AgentPhase.FAILED))
    assert setup.registry.members(RUN)["a"].beat.incarnation == "two"
    setup.registry.hear(RUN, beat(incarnation="two"))


def test_nothing_is_answered_before_the_first_publish(setup: Setup) -> None:
    assert setup.registry.answer(RUN, "a") is None
    setup.registry.hear(RUN, beat())
    assert setup.registry.answer(RUN, "a") is None


def test_a_pod_that_is_not_named_goes_only_when_a_decision_has_seen_it(setup: Setup) -> None:
    registry = setup.registry
    registry.publish(RUN, {"a": HOLD})  # the plan that created b could not know its UID
    registry.hear(RUN, beat("b"))
    assert registry.answer(RUN, "b") is None
    setup.rings.clear()
    registry.publish(RUN, {"a": HOLD})  # may come from a reconcile that began before b existed
    assert registry.answer(RUN, "b") is None
    assert setup.rings == [RUN], "so it asks for another one"
    registry.publish(RUN, {"a": HOLD})
    assert registry.answer(RUN, "b") == NOT_A_MEMBER
    assert setup.rings == [RUN]
    registry.publish(RUN, {"a": HOLD, "b": GO})
    assert registry.answer(RUN, "b") == Answer.of(GO)


async def test_a_waiter_is_woken_by_its_own_news_only(setup: Setup) -> None:
    registry = setup.registry
    registry.hear(RUN, beat("a"))
    registry.hear(RUN, beat("b"))
    registry.publish(RUN, {"a": HOLD, "b": HOLD})
    a = asyncio.create_task(registry.wait(RUN, "a", HOLD.revision, 60))
    b = asyncio.create_task(registry.wait(RUN, "b", HOLD.revision, 60))
    await settle()
    registry.publish(RUN, {"a": GO, "b": replace(HOLD, reason="other words, same revision")})
    await settle()
    assert a.done() and (await a) == Answer.of(GO)
    assert not b.done()
    registry.publish(RUN, {"a": GO, "b": GO})
    assert await asyncio.wait_for(b, 5) == Answer.of(GO)


async def test_waiting_ends_at_its_bound_with_what_is_known(setup: Setup) -> None:
    setup.registry.hear(RUN, beat())
    assert await setup.registry.wait(RUN, "a", "", 0.01) is None
    setup.registry.publish(RUN, {"a": HOLD})
    assert await setup.registry.wait(RUN, "a", HOLD.revision, 0.01) == Answer.of(HOLD)


@pytest.mark.parametrize("end", ["close", "forget", "retain"])
async def test_the_end_frees_who_waits(setup: Setup, end: str) -> None:
    setup.registry.hear(RUN, beat())
    task = asyncio.create_task(setup.registry.wait(RUN, "a", "", 600))
    await settle()
    if end == "close":
        setup.registry.close()
    elif end == "forget":
        setup.registry.forget(RUN)
    else:
        setup.registry.retain({RUN}, set())
    assert await asyncio.wait_for(task, 5) is None


async def test_a_cancelled_waiter_leaves_nothing_behind(setup: Setup) -> None:
    setup.registry.hear(RUN, beat())
    task = asyncio.create_task(setup.registry.wait(RUN, "a", "", 600))
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not setup.registry._runs[RUN].agents["a"].waiters


def test_memory_is_bounded_by_what_exists(setup: Setup) -> None:
    registry = setup.registry
    for run in ("r1", "r2"):
        for pod in ("a", "b"):
            registry.hear(run, beat(f"{run}-{pod}"))
        registry.publish(run, {})
    registry.retain({"r2"}, {"r2-a"})
    assert registry.members("r1") == {}
    assert set(registry.members("r2")) == {"r2-a"}
    registry.forget("r2")
    assert not registry._runs


def test_connected_counts_agents_heard_within_the_time_to_live(setup: Setup) -> None:
    setup.registry.hear(RUN, beat("a"))
    setup.clock.now += 8
    setup.registry.hear("other", beat("b"))
    assert setup.registry.connected(10) == 2
    setup.clock.now += 4
    assert setup.registry.connected(10) == 1


# ---- any order of beats and publishes ---------------------------------------------------------------

pods = st.sampled_from(["a", "b", "c"])
beats = st.builds(
    lambda pod, phase, ready, attempt: ("hear", beat(pod, phase=phase, ready=ready, attempt=attempt)),
    pods,
    st.sampled_from(AgentPhase),
    st.booleans(),
    st.integers(0, 3),
)
publishes = st.builds(
    lambda named: ("publish", named),
    st.dictionaries(pods, st.builds(Directive, action=st.sampled_from(Action), attempt=st.integers(0, 3))),
)


@given(st.lists(st.one_of(beats, publishes), max_size=40))
def test_newest_word_counts_and_exit_needs_two_decisions(steps: list[tuple[str, object]]) -> None:
    rings: list[str] = []
    registry = Registry(on_change=rings.append, clock=FakeClock())
    newest: dict[str, Beat] = {}
    published: dict[str, Directive] = {}
    since: dict[str, int] = {}
    for kind, value in steps:
        before = len(rings)
        if kind == "hear":
            assert isinstance(value, Beat)
            registry.hear(RUN, value)
            assert (len(rings) > before) == (newest.get(value.pod_uid) != value)
            newest[value.pod_uid] = value
            since.setdefault(value.pod_uid, 0)
        else:
            assert isinstance(value, dict)
            registry.publish(RUN, value)
            published = value
            since = {pod: count + 1 for pod, count in since.items()}
        assert {p: m.beat for p, m in registry.members(RUN).items()} == newest
        for pod in newest:
            answer = registry.answer(RUN, pod)
            if pod in published:
                assert answer == Answer.of(published[pod])
            else:
                assert answer == (NOT_A_MEMBER if since[pod] >= 2 else None)
