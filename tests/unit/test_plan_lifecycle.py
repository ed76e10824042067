"""A run's life, phase by phase, as docs/architecture.md tells it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.builders import T0, Scene, a_pod, a_run, quiet
from trainyard_api.protocol import Action, Checkpoint


def test_the_first_attempt_is_persisted_before_anything_exists() -> None:
    scene = Scene()
    first = scene.step()
    assert first.status is not None and first.status.attempt == 1
    assert not first.create_pods and not first.delete_pods and first.directives is None
    assert first.requeue_after == 0.0
    assert (scene.status.phase, scene.condition) == ("Pending", "Created")
    assert [e.attempt for e in scene.status.attempts] == [1]
    second = scene.step()
    assert [c.name for c in second.create_pods] == ["demo-0-1", "demo-1-1"]
    assert scene.reasons() == ["PodCreated"]


def test_nobody_runs_before_all_are_up_and_warm() -> None:
    scene = Scene().created()
    scene.run_pods()
    scene.hear(scene.say(0).ready())
    scene.settle()
    assert {d.action for d in scene.directives.values()} == {Action.HOLD}
    assert scene.condition == "GangForming"
    assert scene.status.nodes.summary == "1/2"
    scene.hear(scene.say(1))  # up, but its zygote is not warm
    scene.settle()
    assert {d.action for d in scene.directives.values()} == {Action.HOLD}
    scene.hear(scene.say(1).ready())
    decided = scene.step()
    assert decided.status is not None and decided.status.attempts[-1].run_time  # persisted before it is told
    told = scene.directives
    assert [told[scene.at(i).uid].node_rank for i in (0, 1)] == [0, 1]
    assert {(d.action, d.attempt, d.nodes, d.master_addr, d.master_port) for d in told.values()} == {
        (Action.RUN, 1, 2, scene.at(0).ip, 29501)
    }
    assert scene.status.phase == "Starting"


def test_training_shows_with_one_event() -> None:
    scene = Scene().started()
    assert (scene.status.phase, scene.condition) == ("Starting", "GangForming")
    scene.stepping(1)
    assert (scene.status.phase, scene.condition) == ("Running", "Training")
    assert scene.status.is_true("Running")
    assert scene.reasons() == ["PodCreated", "Started"]
    assert quiet(scene.plan())


def test_mere_progress_is_written_once_an_interval() -> None:
    scene = Scene().started().stepping(1)
    writes = scene.writes
    for step in range(2, 12):
        scene.wait(1)
        scene.all(lambda beat, step=step: beat.training(1, step, total_steps=200, loss=0.5))
        scene.settle()
    assert scene.writes == writes + 1
    assert (scene.status.step, scene.status.progress, scene.status.loss) == (11, "5%", 0.5)


def test_the_status_tells_what_the_newest_checkpoint_cost() -> None:
    scene = Scene().started().stepping(10)
    costs = {"reason": "auto", "bytes": 12345, "upload_seconds": 1.23456, "stall_seconds": 0.0125}
    saved = Checkpoint(step=10, seq=3, uri="s3://bucket/3", time=T0, **costs)
    scene.hear(replace(scene.say(0).build(), checkpoint=saved)).wait(20)
    scene.settle()
    known = scene.status.checkpoint
    assert known is not None and (known.step, known.seq, known.reason, known.bytes) == (10, 3, "auto", 12345)
    assert (known.upload_seconds, known.stall_seconds) == (1.235, 0.013)
    odd = replace(saved, seq=4, reason="x\n" * 100, bytes=-1, upload_seconds=float("nan"), stall_seconds=-2.0)
    scene.hear(replace(scene.say(1).build(), checkpoint=odd)).wait(20)
    scene.settle()
    known = scene.status.checkpoint
    assert known is not None and (known.seq, known.bytes, known.upload_seconds) == (4, 0, None)
    assert known.stall_seconds is None and len(known.reason) <= 64 and "\n" not in known.reason


def test_complete_is_terminal_and_the_agents_exit() -> None:
    scene = Scene().started().stepping(90)
    scene.all(lambda beat: beat.succeeded(1))
    scene.step()
    assert scene.status.is_true("Complete") and not scene.status.is_true("Running")
    assert (scene.status.phase, scene.status.progress, scene.status.step) == ("Complete", "100%", 90)
    assert scene.status.completion_time and scene.status.attempts[-1].end_time
    assert {(d.action, d.exit_code) for d in scene.directives.values()} == {(Action.EXIT, 0)}
    writes = scene.writes
    scene.drop(0)
    scene.edit(lambda run: run.suspended())
    scene.hear(scene.say(1).failed(1))
    assert quiet(scene.settle())
    assert scene.writes == writes


def test_the_word_of_a_pod_that_ended_counts_as_well_as_a_beat() -> None:
    scene = Scene().started().stepping(90)
    scene.hear(scene.say(0).succeeded(1))
    scene.change(1, phase="Succeeded", termination_message='{"attempt": 1, "outcome": "succeeded"}')
    del scene.members[scene.at(1).uid]
    scene.step()
    assert scene.status.phase == "Complete"


def test_one_member_that_is_done_does_not_complete_the_run() -> None:
    scene = Scene().started().stepping(90)
    scene.hear(scene.say(0).succeeded(1))
    scene.settle()
    assert scene.status.phase == "Running"


def test_pods_that_ignore_the_end_are_deleted_after_a_minute() -> None:
    scene = Scene().started().stepping(5)
    scene.all(lambda beat: beat.succeeded(1))
    scene.step()
    scene.change(0, phase="Succeeded")
    assert scene.settle().requeue_after == pytest.approx(60, abs=1)
    scene.silence(61)
    decided = scene.step()
    assert [d.name for d in decided.delete_pods] == ["demo-1-1"]
    assert "demo-0-1" in scene.pods  # its log stays


def test_ttl_deletes_the_run() -> None:
    scene = Scene(a_run().with_spec(ttlSecondsAfterFinished=300)).started().stepping(5)
    scene.all(lambda beat: beat.succeeded(1))
    scene.settle()
    for index in (0, 1):
        scene.change(index, phase="Succeeded")
    scene.silence(200)
    assert scene.settle().requeue_after == pytest.approx(100, abs=1)
    scene.silence(101)
    assert scene.plan().delete_run


def test_no_ttl_means_for_ever() -> None:
    scene = Scene().started().stepping(5)
    scene.all(lambda beat: beat.succeeded(1))
    scene.settle()
    for index in (0, 1):
        scene.change(index, phase="Succeeded")
    decided = scene.silence(1e8).plan()
    assert not decided.delete_run and decided.requeue_after is None


def test_the_active_deadline_fails_the_run() -> None:
    scene = Scene(a_run().with_spec(activeDeadlineSeconds=100)).started().stepping(5)
    assert scene.plan().requeue_after is not None
    scene.wait(101)
    scene.step()
    assert scene.status.is_true("Failed")
    assert scene.status.condition("Failed").reason == "DeadlineExceeded"
    assert {(d.action, d.exit_code) for d in scene.directives.values()} == {(Action.EXIT, 1)}


def test_a_pending_run_meets_its_deadline_too_and_its_pods_go() -> None:
    scene = Scene(a_run().with_spec(activeDeadlineSeconds=100)).created()
    scene.silence(100)
    scene.settle()
    assert scene.status.phase == "Failed"
    assert not scene.pods  # they never ran: there is no log to keep


def test_runs_of_other_managers_are_not_touched() -> None:
    scene = Scene(a_run().managed_by("kueue.x-k8s.io/multikueue"))
    decided = scene.plan()
    assert quiet(decided) and decided.directives is None and decided.requeue_after is None


def test_a_run_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    scene = Scene().started().edit(lambda run: run.deleting())
    decided = scene.plan()
    assert quiet(decided) and decided.directives == {}


def test_a_restart_of_the_operator_writes_nothing_and_changes_no_directive() -> None:
    scene = Scene().started().stepping(40)
    before, status = dict(scene.directives), scene.status
    scene.restart_operator()
    assert quiet(scene.settle())
    assert scene.directives == before and scene.status == status
    scene.silence(9)
    assert quiet(scene.settle())  # nobody was heard, for less than the TTL
    for index in (0, 1):
        scene.hear(scene.say(index).training(1, 40).resumed(1, 0, first_step_time=T0))
    assert quiet(scene.settle())


@pytest.mark.parametrize("heard", [0, 1])
def test_a_restart_of_the_operator_while_the_gang_forms(heard: int) -> None:
    scene = Scene().created()
    scene.run_pods()
    scene.hear(scene.say(0).ready())
    scene.settle()
    scene.restart_operator()
    if heard:
        scene.hear(scene.say(0).ready())
    assert quiet(scene.settle())
    assert scene.status.nodes.summary == "1/2"
    assert {d.action for d in scene.directives.values()} == {Action.HOLD}


def test_a_late_member_still_gets_its_run() -> None:
    scene = Scene().created()
    scene.run_pods().all(lambda beat: beat.ready())
    scene.settle()
    scene.hear(scene.say(0).starting(1))  # member 1 has not heard of it
    scene.restart_operator()
    scene.hear(scene.say(1).ready())
    scene.settle()
    assert {d.action for d in scene.directives.values()} == {Action.RUN}


def test_surplus_pods_are_deleted_and_told_nothing() -> None:
    scene = Scene().started().stepping(3)
    stray = scene.put(a_pod(7).running())
    decided = scene.step()
    assert [d.uid for d in decided.delete_pods] == [stray.uid]
    assert stray.uid not in scene.directives
