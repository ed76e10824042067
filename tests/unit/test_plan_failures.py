"""What ends an attempt, which cause is named, and what is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.builders import T0, Scene, a_run, quiet
from trainyard_api.protocol import Action, Resumed

Change = Callable[[Scene], object]


def training(run=None) -> Scene:
    scene = Scene(run).started().stepping(40)
    scene.events.clear()
    return scene


ENDINGS: dict[str, tuple[Change, str, str]] = {
    "exception": (
        lambda s: s.hear(
            s.say(1).failed(1, rank=1, code=1, exception="ValueError", message="bad", time=s.now)
        ),
        "WorkerFailed",
        "user",
    ),
    "exit code": (lambda s: s.hear(s.say(1).failed(1, code=3)), "WorkerFailed", "user"),
    "signal": (lambda s: s.hear(s.say(1).failed(1, code=-11)), "WorkerKilled", "user"),
    "CUDA out of memory": (
        lambda s: s.hear(s.say(1).failed(1, exception="torch.OutOfMemoryError")),
        "OutOfMemory",
        "user",
    ),
    "the launcher itself": (
        lambda s: s.hear(s.say(1).failed(1, rank=None, code=None)),
        "WorkerFailed",
        "infrastructure",
    ),
    "configuration": (lambda s: s.hear(s.say(1).failed(1, code=78)), "ConfigurationError", "configuration"),
    "no details": (lambda s: s.hear(s.say(1).failed(0)._with(attempt=1)), "WorkerFailed", "infrastructure"),
    "pod being deleted": (lambda s: s.change(1, deleting=True), "PodLost", "infrastructure"),
    "pod gone": (lambda s: s.drop(1), "PodLost", "infrastructure"),
    "drained before the API says so": (lambda s: s.hear(s.say(1).draining(1)), "PodLost", "infrastructure"),
    "evicted": (
        lambda s: s.change(1, phase="Failed", reason="Evicted", message="low on memory"),
        "Evicted",
        "infrastructure",
    ),
    "preempted": (
        lambda s: s.change(1, deleting=True, reason="PreemptionByScheduler"),
        "Evicted",
        "infrastructure",
    ),
    "node shut down": (
        lambda s: s.change(1, phase="Failed", reason="Terminated"),
        "Evicted",
        "infrastructure",
    ),
    "out of memory": (
        lambda s: s.change(1, phase="Failed", exit_code=137, terminated_reason="OOMKilled"),
        "OutOfMemory",
        "user",
    ),
    "agent killed": (
        lambda s: s.change(1, phase="Failed", exit_code=137, terminated_reason="Error"),
        "PodFailed",
        "infrastructure",
    ),
    "container exits with 1": (lambda s: s.change(1, phase="Failed", exit_code=1), "PodFailed", "user"),
    "container exits with 78": (
        lambda s: s.change(1, phase="Failed", exit_code=78),
        "ConfigurationError",
        "configuration",
    ),
    "stopped early with 0": (
        lambda s: s.change(1, phase="Succeeded", exit_code=0),
        "PodLost",
        "infrastructure",
    ),
    "the agent's last words": (
        lambda s: s.change(
            1,
            phase="Failed",
            exit_code=1,
            termination_message='{"attempt": 1, "outcome": "failed", "exitCode": -9, "rank": 1, "message": "x"}',
        ),
        "WorkerKilled",
        "user",
    ),
    "words about an older attempt": (
        lambda s: s.change(
            1,
            phase="Failed",
            exit_code=137,
            termination_message='{"attempt": 0, "outcome": "failed", "exitCode": 1}',
        ),
        "PodFailed",
        "infrastructure",
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_what_ended_is_named_classified_and_charged_once(name: str) -> None:
    change, reason, charged_to = ENDINGS[name]
    scene = training()
    change(scene)
    scene.silence(3)
    decided = scene.step()
    cause = scene.status.root_cause
    assert cause is not None
    assert (cause.reason, cause.failure_class, cause.node_index) == (reason, charged_to, 1)
    restarts = scene.status.restarts
    if charged_to == "configuration":
        assert scene.status.is_true("Failed") and (restarts.user, restarts.infrastructure) == (0, 0)
        assert scene.status.condition("Failed").reason == "ConfigurationError"
        return
    assert scene.status.attempt == 2 and scene.status.phase == "Restarting"
    assert not decided.create_pods and not decided.delete_pods and decided.directives is None
    assert restarts.user + restarts.infrastructure == 1
    assert getattr(restarts, charged_to) == 1
    closed, current = scene.status.attempts
    assert closed.cause == cause and closed.end_time and closed.last_step == 40
    assert (current.attempt, current.end_time, current.cause) == (2, "", None)
    assert scene.reasons() == [reason]
    assert "attempt 2 starts" in scene.events[0].message
    assert ("demo-1-1" if cause.pod else "member 1") in scene.events[0].message
    scene.settle()
    assert scene.status.attempt == 2  # and not charged again
    assert scene.status.restarts == restarts


@pytest.mark.parametrize("name", ["exception", "signal", "the launcher itself"])
def test_healthy_pods_are_kept(name: str) -> None:
    scene = training()
    pods = dict(scene.pods)
    ENDINGS[name][0](scene)
    scene.silence(3)
    scene.settle()
    assert scene.pods == pods
    assert {(d.action, d.attempt) for d in scene.directives.values()} == {(Action.HOLD, 2)}
    assert len(scene.directives) == 2


@pytest.mark.parametrize(
    "name", ["pod being deleted", "evicted", "agent killed", "drained before the API says so"]
)
def test_only_what_is_lost_is_replaced_under_the_new_attempts_name(name: str) -> None:
    scene = training()
    healthy, lost = scene.at(0), scene.at(1)
    ENDINGS[name][0](scene)
    scene.settle()
    assert scene.pods["demo-0-1"] == healthy
    assert scene.at(1).name == "demo-1-2"
    old = scene.pods.get("demo-1-1")
    assert old is None or old.deleting
    assert lost.uid not in scene.directives
    scene.regroup()
    assert {(d.action, d.attempt) for d in scene.directives.values()} == {(Action.RUN, 2)}
    assert scene.status.attempts[-1].pods_created == 1
    scene.stepping(41, resumed=30)
    entry = scene.status.attempts[-1]
    assert (entry.resumed_step, entry.lost_steps) == (30, 10)
    assert entry.recovery_seconds is not None and entry.recovery_seconds >= 61
    recovered = scene.events[-1]
    assert recovered.reason == "Recovered"
    assert "step 30" in recovered.message and "10 steps lost" in recovered.message


def test_a_silent_agent_is_lost_after_the_ttl_and_not_before() -> None:
    scene = training()
    scene.now += 9.9
    scene.hear(scene.say(0))
    decided = scene.settle()
    assert scene.status.attempt == 1
    assert decided.requeue_after == pytest.approx(0.1, abs=0.05)
    scene.now += 0.2
    scene.step()
    assert scene.status.root_cause.reason == "AgentLost"
    assert scene.status.root_cause.pod == "demo-1-1"
    scene.settle()
    assert scene.pods["demo-1-1"].deleting and "demo-1-2" in scene.pods
    assert scene.at(0).name == "demo-0-1"


def test_silence_while_the_operator_was_away_does_not_count() -> None:
    scene = training()
    scene.silence(3600)
    scene.listening_since = scene.now - 5
    assert quiet(scene.settle())
    scene.silence(6)
    scene.step()
    assert scene.status.root_cause.reason == "AgentLost"


def test_an_agent_that_is_done_may_fall_silent() -> None:
    scene = training()
    scene.hear(scene.say(1).succeeded(1))
    scene.now += 60
    scene.hear(scene.say(0))
    scene.settle()
    assert scene.status.attempt == 1
    scene.hear(scene.say(0).succeeded(1))
    scene.settle()
    assert scene.status.phase == "Complete"


def test_reports_of_other_attempts_and_of_strangers_do_not_count() -> None:
    scene = training()
    scene.hear(scene.say(1).failed(1)).silence(1)
    scene.regroup()
    assert scene.status.attempt == 2
    old = scene.say(1).failed(1)  # late news of attempt 1
    scene.hear(old)
    scene.settle()
    assert scene.status.attempt == 2
    stray = scene.say(1).failed(2)._with(pod_uid="somebody")
    scene.hear(stray)
    scene.settle()
    assert scene.status.attempt == 2


def test_a_fenced_worker_is_not_charged() -> None:
    scene = training()
    scene.hear(scene.say(1).failed(1, code=79)).silence(1)
    scene.step()
    assert scene.status.attempt == 2
    restarts = scene.status.restarts
    assert (restarts.user, restarts.infrastructure, restarts.without_progress) == (0, 0, 0)


def test_the_earliest_rank_that_is_no_echo_is_named() -> None:
    scene = Scene(a_run().with_nodes(3)).started().stepping(40)
    scene.hear(
        scene.say(0).failed(1, rank=0, exception="RuntimeError", collateral=True, time=scene.now - 0.3)
    )
    decided = scene.settle()
    assert scene.status.attempt == 1 and decided.requeue_after <= 2.5  # an echo of something: wait for it
    scene.hear(scene.say(2).failed(1, rank=2, exception="ValueError", message="later", time=scene.now - 0.1))
    decided = scene.settle()
    assert scene.status.attempt == 1 and decided.requeue_after <= 0.16
    scene.now += 0.1
    scene.hear(scene.say(1).failed(1, rank=1, code=-9, time=scene.now - 0.4))
    scene.step()
    assert (scene.status.root_cause.rank, scene.status.root_cause.exit_code) == (1, -9)


def test_a_lost_pod_is_named_before_the_echoes_of_its_death() -> None:
    scene = training()
    scene.hear(scene.say(0).failed(1, rank=0, collateral=True, time=scene.now))
    scene.settle()
    assert scene.status.attempt == 1
    scene.now += 1.2
    scene.change(1, phase="Failed", exit_code=137)
    scene.step()
    assert (scene.status.root_cause.reason, scene.status.restarts.infrastructure) == ("PodFailed", 1)


def test_echoes_alone_are_believed_in_the_end_and_charged_to_the_machine_that_is_silent() -> None:
    scene = training()
    scene.hear(scene.say(0).failed(1, rank=0, collateral=True, time=scene.now))
    scene.silence(2.6)
    scene.step()
    assert scene.status.attempt == 2
    assert (scene.status.root_cause.rank, scene.status.restarts.infrastructure) == (0, 1)


def test_echoes_of_everybody_are_the_programs() -> None:
    scene = training()
    for index in (0, 1):
        scene.hear(scene.say(index).failed(1, rank=index, collateral=True, time=scene.now))
    scene.step()
    assert scene.status.attempt == 2 and scene.status.restarts.user == 1


def test_a_report_that_is_repeated_for_ever_does_not_put_the_decision_off() -> None:
    scene = Scene(a_run().with_nodes(3)).started().stepping(40)
    failed_at = scene.now
    scene.hear(scene.say(0).failed(1, rank=0, collateral=True, time=failed_at))
    for _ in range(60):
        scene.wait(0.1)
        scene.step()
    assert scene.status.attempt == 2


def test_the_start_times_out() -> None:
    scene = Scene(a_run().restarting(startTimeoutSeconds=30)).started()
    scene.wait(29)
    assert quiet(scene.settle())
    assert scene.plan().requeue_after <= 1.01
    scene.wait(1)
    scene.step()
    assert scene.status.root_cause.reason == "StartTimeout"
    assert scene.status.restarts.user == 1


def test_waiting_for_pods_never_fails_the_run() -> None:
    scene = Scene(a_run().restarting(startTimeoutSeconds=30)).created()
    scene.silence(1e6)
    assert quiet(scene.settle())
    assert scene.status.phase == "Pending"


# ---- agents that are not what they were -------------------------------------------------------------


def test_an_agent_that_lost_its_workers_while_the_others_step_ends_the_attempt() -> None:
    scene = training()
    scene.hear(scene.say(1).reborn().ready(attempt=0))
    scene.wait(0.1)
    assert quiet(scene.settle())  # perhaps just an old beat
    scene.wait(4)
    scene.step()
    assert scene.status.attempt == 2
    assert (scene.status.root_cause.reason, scene.status.root_cause.node_index) == ("AgentLost", 1)
    scene.settle()
    assert scene.at(1).name == "demo-1-1"  # it is alive: it is kept


def test_the_same_after_a_restart_of_the_operator() -> None:
    scene = training()
    scene.restart_operator().silence(5)
    scene.hear(scene.say(0).training(1, 50))
    scene.hear(scene.say(1).reborn().ready(attempt=1))
    scene.step()
    assert scene.status.root_cause.reason == "AgentLost"


def test_an_idle_member_before_the_first_step_is_just_late() -> None:
    scene = Scene().started()
    scene.hear(scene.say(1).reborn().ready(attempt=0))
    for _ in range(5):
        scene.wait(5)
        assert quiet(scene.settle())
    assert scene.status.attempt == 1
    assert scene.directives[scene.at(1).uid].action == Action.RUN


def test_an_agent_at_another_address_ends_the_attempt() -> None:
    scene = training()
    scene.hear(scene.say(1)._with(pod_ip="10.9.9.9"))
    scene.step()
    assert scene.status.root_cause.reason == "AgentLost"


def test_an_agent_at_another_address_is_not_told_to_run() -> None:
    scene = Scene().created()
    scene.run_pods().all(lambda beat: beat.ready())
    scene.hear(scene.say(1)._with(pod_ip="10.9.9.9"))
    scene.settle()
    assert {d.action for d in scene.directives.values()} == {Action.HOLD}


# ---- before the gang runs ---------------------------------------------------------------------------


def test_an_older_pod_that_goes_while_the_next_attempt_forms_is_replaced_without_a_charge() -> None:
    scene = training()
    scene.change(1, deleting=True)
    scene.settle()
    assert scene.status.attempt == 2
    scene.change(0, deleting=True)  # a second node goes a moment later
    scene.settle()
    assert scene.status.attempt == 2
    assert scene.status.restarts.infrastructure == 1
    assert {n for n, p in scene.pods.items() if not p.deleting} == {"demo-0-2", "demo-1-2"}


def test_a_pod_of_the_attempt_itself_that_goes_needs_a_new_name_hence_a_new_attempt() -> None:
    scene = Scene().created()
    scene.run_pods()
    scene.change(1, phase="Failed", exit_code=None, reason="OutOfcpu", message="Node didn't have enough cpu")
    scene.step()
    assert (scene.status.attempt, scene.status.root_cause.reason) == (2, "PodFailed")
    assert scene.status.restarts.infrastructure == 1
    assert scene.status.restarts.without_progress == 0
    scene.settle()
    assert set(scene.pods) == {"demo-0-1", "demo-1-2"}


def test_a_pod_whose_agent_never_speaks_is_given_up_after_a_minute() -> None:
    scene = Scene().created()
    scene.run_pods()
    scene.hear(scene.say(0).ready())
    scene.wait(59)
    assert scene.settle().requeue_after <= 1.01
    assert scene.status.attempt == 1
    scene.wait(1)
    scene.step()
    assert scene.status.root_cause.reason == "AgentLost"
    assert "NetworkPolicy" in scene.status.root_cause.message


def test_a_missing_pod_of_a_gang_that_never_ran_is_created_again() -> None:
    scene = Scene().created()
    scene.drop(1)
    scene.settle()
    assert set(scene.pods) == {"demo-0-1", "demo-1-1"} and scene.status.attempt == 1


def test_times_of_pods_with_absurd_clocks_are_kept_within_the_attempt() -> None:
    for when in (-1e18, 0.0, T0 - 1e7, T0 + 1e9, float("nan"), float("inf")):
        scene = training()
        scene.hear(scene.say(1).failed(1, time=when)).silence(3)
        scene.step()
        ended = scene.status.attempts[0].end_time
        assert scene.status.attempts[0].start_time <= ended <= scene.status.attempts[1].start_time


def test_a_member_that_died_with_the_other_is_found_out_before_the_gang_is_told_to_run() -> None:
    scene = training()
    scene.hear(scene.say(0).failed(1)).silence(1)
    scene.settle()
    scene.hear(scene.say(0).ready(2))  # member 1 was heard a second ago, but not since
    scene.settle()
    assert {d.action for d in scene.directives.values()} == {Action.HOLD}
    scene.now += 9.5
    scene.hear(scene.say(0))
    scene.settle()
    assert scene.status.attempt == 2 and scene.at(1).name == "demo-1-2"
    assert scene.status.restarts.infrastructure == 0


def test_a_store_that_refuses_fails_the_run_before_any_worker_has_started() -> None:
    scene = Scene().created().run_pods()
    scene.events.clear()
    message = "s3://no-such/x: bucket 'no-such' does not exist; create it or correct the checkpoint URI"
    scene.hear(scene.say(1)._with(blocked=message))
    scene.settle()
    scene.silence(1.0).settle()
    failed = scene.status.condition("Failed")
    assert failed is not None and (failed.status, failed.reason) == ("True", "ConfigurationError")
    assert message in failed.message
    assert [e.warning for e in scene.events] == [True]
    assert scene.status.attempt == 1


def test_what_blocked_a_pod_does_not_end_a_gang_that_runs() -> None:
    scene = training()
    scene.hear(scene.say(0)._with(blocked="s3://x: refused"))
    assert scene.settle().status is None
    assert not scene.status.finished


def test_a_rank_that_was_killed_is_not_discussed() -> None:
    """SIGKILL comes from outside: no other rank's report can be its cause, so nobody waits for one."""
    scene = training()
    scene.hear(scene.say(1).failed(1, rank=3, code=-9, time=scene.now))
    assert scene.step().status is not None
    assert scene.status.attempt == 2
    assert scene.status.root_cause.rank == 3


def test_a_checkpoint_that_was_passed_over_is_told_once() -> None:
    scene = training()
    scene.hear(scene.say(1).failed(1, rank=3, code=-9, time=scene.now))
    scene.settle()
    scene.all(lambda beat: beat.ready())
    scene.settle()
    why = "commits/00000009.json: shard of rank 0 has another SHA-256"
    scene.events.clear()
    scene.all(lambda beat: beat.training(2, 31)._with(resumed=Resumed(attempt=2, step=30, fell_back=why)))
    scene.settle()
    assert scene.status.attempts[-1].passed_over == why
    told = [e for e in scene.events if e.reason == "CheckpointPassedOver"]
    assert [e.warning for e in told] == [True] and why in told[0].message
    scene.silence(60).all(
        lambda beat: beat.training(2, 90)._with(resumed=Resumed(attempt=2, step=30, fell_back=why))
    )
    scene.settle()
    assert len([e for e in scene.events if e.reason == "CheckpointPassedOver"]) == 1
