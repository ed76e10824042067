"""Suspend and resume."""

from __future__ import annotations

import pytest

from tests.builders import Scene, a_run, quiet
from trainyard_api.protocol import Action


def stopped() -> Scene:
    scene = Scene(a_run().with_spec(activeDeadlineSeconds=100)).started().stepping(40)
    scene.wait(30)
    scene.events.clear()
    scene.edit(lambda run: run.suspended())
    scene.step()
    return scene


def test_a_run_that_is_created_suspended_does_not_begin() -> None:
    scene = Scene(a_run().suspended())
    scene.settle()
    assert (scene.status.phase, scene.status.attempt, scene.pods) == ("Suspended", 0, {})
    assert scene.status.is_true("Suspended") and scene.status.start_time == "" == scene.status.active_since
    scene.edit(lambda run: run.suspended(False))
    scene.settle()
    assert scene.status.attempt == 1 and len(scene.pods) == 2
    suspended = scene.status.condition("Suspended")
    assert (suspended.status, suspended.reason) == ("False", "Resumed")


def test_suspended_is_true_only_when_the_last_pod_is_gone() -> None:
    scene = stopped()
    assert scene.status.phase == "Suspending" and not scene.status.is_true("Suspended")
    assert all(p.deleting for p in scene.pods.values())
    assert {(d.action, d.exit_code) for d in scene.directives.values()} == {(Action.EXIT, 0)}
    assert quiet(scene.settle())
    scene.drop(0)
    assert quiet(scene.settle()) and scene.status.phase == "Suspending"
    scene.drop(1)
    scene.settle()
    assert scene.status.phase == "Suspended" and scene.status.is_true("Suspended")
    assert not scene.status.is_true("Running")
    assert scene.reasons() == ["Suspending", "Suspended"]
    assert quiet(scene.silence(1e6).settle())


def test_the_attempt_ends_without_cause_and_without_charge() -> None:
    scene = stopped()
    entry = scene.status.attempts[-1]
    assert entry.end_time and entry.cause is None and entry.last_step == 40
    restarts = scene.status.restarts
    assert restarts.user == restarts.infrastructure == restarts.without_progress == 0
    scene.hear(scene.say(0).failed(1, code=-15)).silence(5)  # dying pods say all sorts of things
    scene.settle()
    assert scene.status.restarts == restarts and scene.status.attempt == 1


def test_resume_is_a_new_attempt_from_where_it_was() -> None:
    scene = stopped()
    scene.pods.clear()
    scene.settle()
    scene.edit(lambda run: run.suspended(False))
    resumed = scene.step()
    assert scene.status.attempt == 2 and not resumed.create_pods
    assert scene.reasons()[-1] == "Resumed"
    scene.settle()
    assert set(scene.pods) == {"demo-0-2", "demo-1-2"}
    scene.run_pods().all(lambda beat: beat.ready())
    scene.settle()
    scene.stepping(41, resumed=40)
    assert scene.status.phase == "Running" and not scene.status.is_true("Suspended")
    entry = scene.status.attempts[-1]
    assert (entry.resumed_step, entry.lost_steps, entry.recovery_seconds) == (40, 0, None)
    assert "from step 40" in scene.events[-1].message


@pytest.mark.parametrize("gone", [0, 1])
def test_a_change_of_mind_while_pods_still_end(gone: int) -> None:
    scene = stopped()
    if gone:
        scene.drop(0)
    scene.edit(lambda run: run.suspended(False))
    scene.settle()
    assert scene.status.attempt == 2
    assert {n for n, p in scene.pods.items() if not p.deleting} == {"demo-0-2", "demo-1-2"}


def test_suspended_time_does_not_count_as_active() -> None:
    scene = stopped()
    scene.pods.clear()
    scene.settle()
    assert scene.status.active_seconds == 30 and scene.status.active_since == ""
    scene.silence(1e5)
    scene.edit(lambda run: run.suspended(False))
    scene.settle()
    assert scene.status.active_since and scene.status.phase == "Pending"
    scene.silence(69)
    scene.settle()
    assert scene.status.phase == "Pending"
    scene.silence(2)
    scene.settle()
    assert scene.status.condition("Failed").reason == "DeadlineExceeded"


def test_an_operator_that_died_in_between_goes_on_with_the_deletes() -> None:
    scene = Scene().started().stepping(4)
    scene.edit(lambda run: run.suspended())
    decided = scene.plan()
    scene.status = decided.status  # persisted, and then nothing more was done
    scene.restart_operator()
    assert {d.uid for d in scene.step().delete_pods} == {p.uid for p in scene.pods.values()}
    assert all(p.deleting for p in scene.pods.values())
