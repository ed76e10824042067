"""Whatever happens in whatever order: the promises hold, and when the faults stop the run gets there.

The promises are in `plan_world.World`; hypothesis looks for an order of events that breaks one. That the
promises can see is shown with planners that have a bug.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.builders import Planner, a_run
from tests.unit.plan_world import RULES, WITH_DELETION, Violation, World, happen, live
from trainyard_api.contract import FINALIZER
from trainyard_api.protocol import Action, Directive
from trainyard_api.v1alpha1 import Status
from trainyard_operator.plan import Observed, Plan, PlanSettings, plan
from trainyard_operator.plan.model import CreatePod, Member
from trainyard_operator.plan.names import pod_name


class AnyLife(RuleBasedStateMachine):
    """A life that hypothesis chooses; the fair tail follows in `teardown`."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(
        what=st.sampled_from([name for name, weight in RULES.items() for _ in range(weight)]),
        pick=st.integers(0, 59),
    )
    def something_happens(self, what: str, pick: int) -> None:
        happen(self.world, what, pick)

    @rule(
        whats=st.lists(st.sampled_from(["reconcile", "deliver", "kubelet", "talk", "train"]), max_size=20),
        pick=st.integers(0, 59),
    )
    def all_goes_well_for_a_while(self, whats: list[str], pick: int) -> None:
        for number, what in enumerate(whats):
            happen(self.world, what, pick + number)

    def teardown(self) -> None:
        self.world.tail()


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("seed", range(60))
def test_random_lives(seed: int) -> None:
    live(plan, seed, 300)


DELETES = a_run().with_spec(checkpoint={"uri": "s3://bucket/demo", "deletionPolicy": "Delete"})


class AnyEnd(RuleBasedStateMachine):
    """A run with deletionPolicy Delete, which is deleted at a time that hypothesis chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(run=DELETES)

    @rule(
        what=st.sampled_from([name for name, weight in WITH_DELETION.items() for _ in range(weight)]),
        pick=st.integers(0, 59),
    )
    def something_happens(self, what: str, pick: int) -> None:
        happen(self.world, what, pick)

    @rule(pick=st.integers(0, 59))
    def it_is_deleted_while_the_operator_crashes(self, pick: int) -> None:
        self.world.delete_run()
        happen(self.world, "crash_operator", pick)

    def teardown(self) -> None:
        self.world.delete_run()
        self.world.tail()


TestAnyEnd = AnyEnd.TestCase
TestAnyEnd.settings = TestAnyLife.settings


def test_random_ends() -> None:
    """Both ends happen: the checkpoints are gone, or the status says that they stay."""
    results = set()
    for seed in range(60):
        world = live(plan, seed, 300, run=DELETES)
        world.delete_run()
        world.tail()
        cleanup = world.status.cleanup
        results.add(cleanup.result if cleanup is not None else "")
        assert cleanup is None or cleanup.result == "LeftBehind" or not world.stored
    assert "Deleted" in results


# ---- planners with a bug ----------------------------------------------------------------------------

Bug = Callable[[Observed, PlanSettings, Plan], Plan]


def after(bug: Bug) -> Planner:
    """A planner whose result is spoilt."""
    return lambda observed, settings_: bug(observed, settings_, plan(observed, settings_))


def before(bug: Callable[[Observed], Observed]) -> Planner:
    """A planner whose view is spoilt."""
    return lambda observed, settings_: plan(bug(observed), settings_)


def creates_before_it_persists(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    if good.status is None or good.status.attempt == observed.run.status.attempt:
        return good
    name = pod_name(observed.run.name, 0, good.status.attempt)
    return Plan(create_pods=(CreatePod(name=name, body={}),), requeue_after=0.0)


def charges_twice(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    now, new = observed.run.status.restarts, good.status.restarts if good.status else None
    if good.status is None or new is None or new.user == now.user:
        return good
    return replace(good, status=replace(good.status, restarts=replace(new, user=new.user + 1)))


def charges_a_suspend(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    known = observed.run.status
    if good.status is None or known.phase != "Suspended" or good.status.attempt != known.attempt + 1:
        return good
    restarts = replace(known.restarts, infrastructure=known.restarts.infrastructure + 1)
    return replace(good, status=replace(good.status, restarts=restarts))


def numbers_attempts_anew_after_a_suspend(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    if good.status is None or observed.run.status.phase != "Suspended" or good.status.phase != "Pending":
        return good
    return replace(good, status=replace(good.status, attempt=1))


def undoes_the_end(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    status = observed.run.status
    if not status.finished or len(observed.pods) == 2:
        return good
    return Plan(status=Status(attempt=status.attempt, phase="Pending", restarts=status.restarts))


def tells_surplus_pods_to_run(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    told = dict(good.directives or {})
    by_rank = {d.node_rank: d for d in told.values() if d.action is Action.RUN}
    told |= {p.uid: by_rank[p.index] for p in observed.pods if p.index in by_rank}
    return replace(good, directives=told) if by_rank else good


def says_suspended_too_early(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    if good.status is None or good.status.phase != "Suspending":
        return good
    conditions = [replace(c, status="True") if c.type == "Suspended" else c for c in good.status.conditions]
    return replace(good, status=replace(good.status, conditions=conditions))


def runs_an_incomplete_gang(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    status = observed.run.status
    told = good.directives or {}
    if len(told) != 1 or next(iter(told.values())).action is not Action.HOLD:
        return good
    return replace(
        good, directives={uid: Directive(action=Action.RUN, attempt=status.attempt) for uid in told}
    )


def never_replaces(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    return replace(good, create_pods=()) if observed.pods else good


def never_deletes(_: Observed, __: PlanSettings, good: Plan) -> Plan:
    return replace(good, delete_pods=())


def uses_names_again(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    creates = tuple(
        CreatePod(name=pod_name(observed.run.name, int(c.name.split("-")[1]), 1), body=c.body)
        for c in good.create_pods
    )
    return replace(good, create_pods=creates)


def writes_always(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    if good.status is not None or observed.run.status.finished:
        return good
    return replace(good, status=observed.run.status)


def waits_for_an_edge(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    """Creates only in the round that sees the fresh attempt."""
    fresh = (observed.run.status.condition("Running") or None) is not None
    reason = observed.run.status.condition("Running").reason if fresh else ""  # type: ignore[union-attr]
    return good if reason in ("Created", "Resumed", "Restarting") else replace(good, create_pods=())


def forgets_that_the_gang_runs(observed: Observed) -> Observed:
    status = observed.run.status
    if observed.members:
        return observed
    attempts = [replace(e, run_time="") for e in status.attempts]
    return replace(observed, run=replace(observed.run, status=replace(status, attempts=attempts)))


def calls_everybody_silent_at_once(observed: Observed) -> Observed:
    return replace(observed, listening_since=0.0)


def believes_old_news(observed: Observed) -> Observed:
    attempt = observed.run.status.attempt
    members = {
        uid: Member(
            beat=replace(
                m.beat,
                attempt=attempt,
                failure=replace(m.beat.failure, attempt=attempt) if m.beat.failure else None,
            ),
            received=m.received,
        )
        for uid, m in observed.members.items()
    }
    return replace(observed, members=members)


MUTANTS: dict[str, Planner] = {
    bug.__name__: after(bug)
    for bug in (
        creates_before_it_persists,
        charges_twice,
        charges_a_suspend,
        numbers_attempts_anew_after_a_suspend,
        undoes_the_end,
        tells_surplus_pods_to_run,
        says_suspended_too_early,
        runs_an_incomplete_gang,
        never_replaces,
        never_deletes,
        uses_names_again,
        writes_always,
        waits_for_an_edge,
    )
} | {
    bug.__name__: before(bug)
    for bug in (forgets_that_the_gang_runs, calls_everybody_silent_at_once, believes_old_news)
}


def lets_go_before_it_cleaned(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    if not observed.run.deleting or good.finalizers is not None:
        return good
    return Plan(finalizers=(), directives={})


def cleans_beside_living_pods(observed: Observed, _: PlanSettings, good: Plan) -> Plan:
    if not observed.run.deleting or not good.delete_pods:
        return good
    number = observed.run.status.cleanup.tries if observed.run.status.cleanup else 0
    return Plan(
        create_pods=(CreatePod(name=f"{observed.run.name}-cleanup-{number}", body={}),), directives={}
    )


def forgets_the_finalizer(observed: Observed) -> Observed:
    return replace(observed, run=replace(observed.run, finalizers=(FINALIZER,)))


def trusts_any_end(observed: Observed) -> Observed:
    said = '{"outcome": "deleted"}'
    return replace(
        observed,
        pods=tuple(
            replace(p, phase="Succeeded", termination_message=said) if "-cleanup-" in p.name else p
            for p in observed.pods
        ),
    )


ENDLESS: dict[str, Planner] = {
    bug.__name__: after(bug) for bug in (lets_go_before_it_cleaned, cleans_beside_living_pods)
} | {bug.__name__: before(bug) for bug in (forgets_the_finalizer, trusts_any_end)}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_planner_that_deletes_wrongly_is_caught(name: str) -> None:
    with pytest.raises(Violation):
        for seed in range(60):
            world = live(ENDLESS[name], seed, 300, run=DELETES)
            world.delete_run()
            world.tail()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planner_with_a_bug_is_caught(name: str) -> None:
    with pytest.raises(Violation):
        for seed in range(60):
            live(MUTANTS[name], seed, 300)
