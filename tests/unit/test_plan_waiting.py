"""Trouble on the way to a running gang is in the Running condition and in one Warning Event, with advice."""

from __future__ import annotations

import pytest

from tests.builders import Scene, quiet
from trainyard_operator.plan.model import Refusal

TROUBLES = {
    "image": (
        {"waiting_reason": "ErrImagePull", "waiting_message": "not found: x:1"},
        "ImagePullFailed",
        "imagePullSecrets",
    ),
    "name of the image": ({"waiting_reason": "InvalidImageName"}, "ImagePullFailed", "spec.image"),
    "missing secret": (
        {"waiting_reason": "CreateContainerConfigError", "waiting_message": 'secret "s3" not found'},
        "ContainerConfigError",
        'secret "s3" not found',
    ),
    "missing volume": (
        {
            "node": "node-1",
            "waiting_reason": "ContainerCreating",
            "setup_trouble": 'FailedMount: configmap "digits" not found',
        },
        "ContainerConfigError",
        'configmap "digits" not found',
    ),
    "no node": (
        {"unschedulable": "0/2 nodes are available: 2 Insufficient cpu."},
        "Unschedulable",
        "Insufficient cpu",
    ),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_shows_once(name: str) -> None:
    fields, reason, said = TROUBLES[name]
    scene = Scene().created()
    scene.events.clear()
    scene.change(1, **fields)
    scene.settle()
    running = scene.status.condition("Running")
    assert (running.status, running.reason) == ("False", reason)
    assert said in running.message and "demo-1-1" in running.message
    assert [(e.reason, e.warning) for e in scene.events] == [(reason, True)]
    assert quiet(scene.silence(1000).settle())
    assert scene.status.attempt == 1 and scene.status.phase == "Pending"
    scene.change(1, waiting_reason="", unschedulable="", setup_trouble="")
    scene.run_pods().all(lambda beat: beat.ready())
    scene.settle()
    assert scene.status.phase == "Starting"


def test_the_kubelets_changing_words_are_not_written_again_and_again() -> None:
    scene = Scene().created()
    scene.change(0, waiting_reason="ErrImagePull", waiting_message="denied")
    scene.settle()
    writes, events = scene.writes, len(scene.events)
    for reason, message in [
        ("ImagePullBackOff", "Back-off pulling image"),
        ("ErrImagePull", "denied again"),
    ] * 10:
        scene.silence(15)
        scene.change(0, waiting_reason=reason, waiting_message=message)
        scene.settle()
    assert (scene.writes, len(scene.events)) == (writes, events)
    assert "denied" in scene.status.condition("Running").message


def test_a_back_off_is_replaced_by_the_real_complaint() -> None:
    scene = Scene().created()
    scene.change(0, waiting_reason="ImagePullBackOff", waiting_message="Back-off pulling image")
    scene.settle()
    scene.silence(15)
    scene.change(0, waiting_reason="ErrImagePull", waiting_message="denied")
    scene.settle()
    assert "denied" in scene.status.condition("Running").message


def test_a_scheduler_that_says_something_new_is_written_at_most_once_an_interval() -> None:
    scene = Scene().created()
    scene.change(0, unschedulable="0/1")
    scene.settle()
    writes = scene.writes
    for second in range(20):
        scene.silence(1)
        scene.change(0, unschedulable=f"0/{second}")
        scene.settle()
    assert scene.writes - writes == 2
    assert scene.reasons().count("Unschedulable") == 1


def test_pods_that_the_api_refuses_show_and_are_tried_again() -> None:
    scene = Scene()
    scene.step()
    assert len(scene.plan().create_pods) == 2
    scene.refusals = (Refusal(pod="demo-1-1", message='exceeded quota: "gpus"', retry_at=scene.now + 4),)
    decided = scene.step()
    assert [c.name for c in decided.create_pods] == ["demo-0-1"]
    assert scene.condition == "CreateFailed" and "exceeded quota" in scene.status.condition("Running").message
    assert [e.reason for e in scene.events if e.warning] == ["CreateFailed"]
    assert scene.settle().requeue_after == pytest.approx(4)
    scene.silence(4)
    assert [c.name for c in scene.plan().create_pods] == ["demo-1-1"]
    scene.step()
    scene.settle()
    assert scene.condition == "PodsPending"  # it exists now, whatever was refused before


def test_a_pod_that_is_created_for_long_says_where_to_look() -> None:
    scene = Scene().created()
    scene.change(0, waiting_reason="ContainerCreating", node="node-7")
    scene.silence(20).settle()
    running = scene.status.condition("Running")
    assert running.reason == "PodsPending"
    assert "node-7" in running.message and "kubectl describe pod demo-0-1" in running.message


def test_agents_that_are_not_ready_are_quoted() -> None:
    scene = Scene().created()
    scene.run_pods().all(lambda beat: beat)
    scene.hear(scene.say(1)._with(warnings=["no module named torch"]))
    scene.settle()
    assert scene.condition == "GangForming"
    assert "demo-1-1: no module named torch" in scene.status.condition("Running").message


def test_warnings_while_training_are_shown_without_extra_writes() -> None:
    scene = Scene().started().stepping(1)
    writes = scene.writes
    scene.hear(scene.say(1)._with(warnings=["the upload fails: 503"]))
    scene.settle()
    assert scene.writes == writes
    scene.wait(11).settle()
    assert scene.writes == writes + 1 and "503" in scene.status.condition("Running").message
