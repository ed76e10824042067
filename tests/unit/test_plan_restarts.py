"""Budgets and back-off."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.builders import Scene, a_policy, a_run
from trainyard_api.v1alpha1 import MAX_ATTEMPTS, AttemptStatus, Cause, Restarts, Status
from trainyard_operator.plan.restarts import judge
from trainyard_operator.plan.times import parse

USER = Cause(reason="WorkerFailed", failure_class="user")
INFRA = Cause(reason="PodLost", failure_class="infrastructure")
CONFIG = Cause(reason="ConfigurationError", failure_class="configuration")
STEPPED = AttemptStatus(attempt=1, first_step_time="2026-01-01T00:00:00Z", last_step=10)
NEVER_RAN = AttemptStatus(attempt=1)


NOTHING = Restarts()


def verdict(cause=USER, entry=STEPPED, restarts=NOTHING, best=10, charged=True, history=(), **policy):
    status = Status(attempt=1, best_step=best, restarts=restarts, attempts=list(history))
    return judge(status, a_policy(**policy), entry, cause, charged=charged)


@pytest.mark.parametrize(
    ("failures", "delay"), [(0, 1), (1, 2), (2, 4), (3, 8), (5, 32), (6, 60), (40, 60), (4000, 60)]
)
def test_the_pause_doubles_without_progress_up_to_its_limit(failures: int, delay: float) -> None:
    judged = verdict(restarts=Restarts(without_progress=failures), no_progress_limit=10_000)
    assert judged.delay == delay and judged.give_up is None
    assert judged.restarts.without_progress == failures + 1


def test_after_progress_there_is_no_pause_and_the_count_is_reset() -> None:
    judged = verdict(best=9, restarts=Restarts(user=2, without_progress=2))
    assert (judged.delay, judged.restarts) == (0.0, Restarts(user=3))


def test_reaching_the_best_step_again_is_no_progress() -> None:
    assert verdict(best=10).delay == 1.0


@pytest.mark.parametrize(
    ("cause", "restarts", "gives_up"),
    [
        (USER, Restarts(user=9), None),
        (USER, Restarts(user=10), "RestartsExhausted"),
        (USER, Restarts(infrastructure=1000), None),
        (INFRA, Restarts(infrastructure=99), None),
        (INFRA, Restarts(infrastructure=100), "RestartsExhausted"),
        (INFRA, Restarts(user=1000), None),
        (CONFIG, Restarts(), "ConfigurationError"),
    ],
)
def test_each_class_has_its_budget(cause: Cause, restarts: Restarts, gives_up: str | None) -> None:
    judged = verdict(cause, best=0, restarts=restarts)
    assert judged.give_up == gives_up
    if gives_up:
        assert judged.restarts == restarts  # there is no restart to count


def test_a_budget_of_nothing_means_no_restart() -> None:
    assert verdict(best=0, max_restarts=0).give_up == "RestartsExhausted"
    assert verdict(INFRA, best=0, max_restarts=0).give_up is None


def test_attempts_without_progress_are_limited() -> None:
    assert verdict(restarts=Restarts(without_progress=1)).give_up is None
    judged = verdict(restarts=Restarts(without_progress=2))
    assert judged.give_up == "NoProgress" and "3 attempts" in judged.why


def test_machines_lost_before_the_first_step_do_not_count_as_no_progress() -> None:
    judged = verdict(INFRA, NEVER_RAN, restarts=Restarts(without_progress=2))
    assert judged.give_up is None and judged.restarts.without_progress == 2
    assert verdict(INFRA, STEPPED, restarts=Restarts(without_progress=2)).give_up == "NoProgress"
    assert verdict(USER, NEVER_RAN, restarts=Restarts(without_progress=2)).give_up == "NoProgress"


def test_but_they_pace_the_back_off() -> None:
    history = [AttemptStatus(attempt=n, cause=INFRA) for n in (1, 2, 3)]
    status = Status(attempt=4, attempts=[*history, AttemptStatus(attempt=4)])
    judged = judge(status, a_policy(), AttemptStatus(attempt=4), INFRA, charged=True)
    assert judged.delay == 8.0


def test_the_back_off_is_kept_and_is_waited_for() -> None:
    scene = Scene(a_run().restarting(backoffSeconds=5)).started()
    scene.hear(scene.say(0).failed(1)).silence(1)
    scene.step()
    assert scene.condition == "BackOff"
    assert parse(scene.status.not_before) == pytest.approx(scene.now + 5)
    scene.all(lambda beat: beat.ready(2))
    scene.settle()
    assert scene.status.attempts[-1].run_time == ""
    scene.wait(2)
    assert scene.settle().requeue_after == pytest.approx(3)
    scene.silence(3)
    scene.settle()
    assert scene.status.attempts[-1].run_time and scene.status.not_before == ""


def test_an_attempt_that_made_progress_is_followed_at_once() -> None:
    scene = Scene().started().stepping(7)
    scene.hear(scene.say(0).failed(1)).silence(1)
    scene.settle()
    assert scene.status.not_before == "" and scene.status.best_step == 7
    scene.all(lambda beat: beat.ready(2))
    scene.settle()
    assert scene.status.attempts[-1].run_time


def test_three_attempts_without_progress_fail_the_run() -> None:
    scene = Scene().started()
    for attempt in (1, 2):
        scene.hear(
            scene.say(0).failed(attempt, exception="ImportError", message="no module named x")
        ).silence(1)
        scene.step()
        assert scene.status.attempt == attempt + 1
        scene.regroup()
    scene.hear(scene.say(0).failed(3, exception="ImportError", message="no module named x")).silence(1)
    scene.step()
    failed = scene.status.condition("Failed")
    assert failed.reason == "NoProgress" and "no module named x" in failed.message
    assert scene.status.attempt == 3 and scene.status.restarts == Restarts(user=2, without_progress=3)
    assert scene.status.root_cause.exception == "ImportError"


def test_history_is_bounded_and_keeps_the_newest() -> None:
    scene = Scene(a_run().restarting(maxRestarts=1000)).started()
    for attempt in range(1, 25):
        scene.stepping(attempt)
        scene.hear(scene.say(0).failed(attempt)).silence(1)
        scene.regroup()
    assert [e.attempt for e in scene.status.attempts] == list(range(25 - MAX_ATTEMPTS + 1, 26))
    assert scene.status.restarts.user == 24


def test_counters_survive_a_suspend() -> None:
    scene = Scene().started().stepping(3)
    scene.hear(scene.say(0).failed(1)).silence(1)
    scene.settle()
    counted = scene.status.restarts
    scene.edit(lambda run: run.suspended())
    scene.settle()
    scene.pods.clear()
    scene.settle()
    scene.edit(lambda run: run.suspended(False))
    scene.settle()
    assert scene.status.attempt == 3 and scene.status.restarts == counted == replace(Restarts(), user=1)
