"""deletionPolicy Delete: the finalizer, the one pod at a time, and the end of every wait."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.builders import Scene, a_run, quiet
from trainyard_api import contract
from trainyard_api.contract import FINALIZER
from trainyard_api.v1alpha1 import CheckpointSpec
from trainyard_operator.observe import controlled_by, pod_view
from trainyard_operator.plan.cleanup import (
    END_SECONDS,
    MAX_TRIES,
    START_SECONDS,
    TROUBLE_SECONDS,
)
from trainyard_operator.plan.cleanup_pod import WORK_SECONDS, cleanup_number, cleanup_pod
from trainyard_operator.plan.model import Refusal

GRACE = 30
DELETES = a_run().with_spec(checkpoint={"uri": "s3://bucket/demo", "deletionPolicy": "Delete"})
DONE = json.dumps({"outcome": "deleted", "message": "12 objects, 34 bytes"})


def deleted(run=DELETES) -> Scene:
    """A run that trained, was deleted, and of which all pods have ended."""
    scene = Scene(run).started().stepping(10)
    scene.edit(lambda b: b.deleting())
    scene.step()
    scene.step()
    end_pods(scene)
    return scene


def end_pods(scene: Scene) -> None:
    for name in [n for n, p in scene.pods.items() if p.deleting]:
        del scene.pods[name]


def trying(number: int = 1) -> Scene:
    """The cleanup pod of the first try is asked for."""
    scene = deleted()
    scene.step()
    scene.step()
    assert list(scene.pods) == [f"demo-cleanup-{number}"]
    return scene


def cleanup(scene: Scene, **fields: Any) -> None:
    (pod,) = scene.pods.values()
    scene.put(replace(pod, **fields))


def failed(scene: Scene, code: int = 1, message: str = "no route") -> None:
    said = json.dumps({"outcome": "failed", "message": message})
    cleanup(scene, phase="Failed", exit_code=code, termination_message=said)


def released(scene: Scene) -> bool:
    return FINALIZER not in scene.run.finalizers


# ---- before the deletion ----------------------------------------------------------------------------


def test_the_finalizer_comes_before_everything_else() -> None:
    scene = Scene(DELETES.with_finalizers("example.com/other"))
    first = scene.step()
    assert first.finalizers == ("example.com/other", FINALIZER) and first.requeue_after == 0.0
    assert first.status is None and not first.create_pods and first.directives is None
    scene.started()
    assert quiet(scene.plan()), "it is set once"


@pytest.mark.parametrize("policy", [None, "Retain"])
def test_runs_that_keep_their_checkpoints_have_no_finalizer(policy: str | None) -> None:
    checkpoint = {"uri": "s3://b/p"} | ({"deletionPolicy": policy} if policy else {})
    scene = Scene(a_run().with_spec(checkpoint=checkpoint)).started()
    assert scene.run.finalizers == ()
    scene.edit(lambda b: b.deleting())
    assert quiet(scene.step()) and scene.directives == {}


def test_a_finished_run_is_held_too() -> None:
    scene = Scene(DELETES).started().all(lambda b: b.succeeded(1))
    scene.settle()
    assert scene.status.is_true("Complete") and scene.run.finalizers == (FINALIZER,)
    scene.builder = scene.builder.with_finalizers()
    assert scene.plan().finalizers == (FINALIZER,)


def test_a_run_of_somebody_else_is_not_held() -> None:
    assert quiet(Scene(DELETES.managed_by("example.com/other")).plan())


# ---- what happens at the deletion -------------------------------------------------------------------


def test_from_the_deletion_to_the_release() -> None:
    scene = Scene(DELETES).started().stepping(10)
    pods = {p.name for p in scene.pods.values()}
    scene.edit(lambda b: b.deleting())
    first = scene.step()
    assert first.status is not None and first.status.cleanup is not None and not first.delete_pods
    second = scene.step()
    assert {d.name for d in second.delete_pods} == pods and second.directives == {}
    assert scene.step().requeue_after is not None, "it looks again though nothing may happen"
    assert not scene.plan().create_pods and scene.status.cleanup is not None
    end_pods(scene)
    told = scene.step()
    assert told.status is not None and told.status.cleanup is not None and told.status.cleanup.tries == 1
    assert not told.create_pods, "persisted first"
    scene.step()
    assert list(scene.pods) == ["demo-cleanup-1"]
    assert quiet(scene.plan())
    cleanup(scene, phase="Running")
    assert quiet(scene.plan())
    cleanup(scene, phase="Succeeded", exit_code=0, termination_message=DONE)
    scene.step()
    assert scene.status.cleanup is not None and scene.status.cleanup.result == "Deleted"
    assert not released(scene), "persisted first"
    scene.step()
    assert released(scene) and quiet(scene.step())
    assert scene.reasons()[-2:] == ["DeletingCheckpoints", "CheckpointsDeleted"]
    assert "12 objects, 34 bytes" in scene.events[-1].message and not scene.events[-1].warning
    assert f"s3://bucket/demo/{DELETES.uid}/" in scene.events[-1].message


def test_other_finalizers_stay() -> None:
    scene = trying()
    scene.builder = scene.builder.with_finalizers("a.example/1", FINALIZER, "b.example/2")
    cleanup(scene, phase="Succeeded", exit_code=0, termination_message=DONE)
    scene.step()
    scene.step()
    assert scene.run.finalizers == ("a.example/1", "b.example/2")


def test_a_run_that_never_began_goes_at_once() -> None:
    scene = Scene(DELETES.with_finalizers(FINALIZER)).edit(lambda b: b.deleting())
    scene.step()
    assert released(scene) and not scene.pods and scene.status.cleanup is None


def test_our_finalizer_on_a_run_that_keeps_its_checkpoints_is_taken_off() -> None:
    scene = Scene(a_run().with_finalizers(FINALIZER)).started().edit(lambda b: b.deleting())
    scene.step()
    assert released(scene) and all("cleanup" not in name for name in scene.pods)


def test_the_logs_of_ended_pods_do_not_hold_it_up() -> None:
    scene = Scene(DELETES).started().stepping(10)
    for pod in list(scene.pods.values()):
        scene.put(replace(pod, phase="Succeeded", exit_code=0))
    scene.edit(lambda b: b.deleting())
    scene.step()
    assert scene.step().status is not None, "the first try is written down"


@pytest.mark.parametrize("finalizer", ["foregroundDeletion", "orphan"])
def test_the_garbage_collector_goes_first(finalizer: str) -> None:
    """It deletes the children of a run that has foregroundDeletion, whatever they are for."""
    scene = deleted()
    scene.builder = scene.builder.with_finalizers(FINALIZER, finalizer)
    assert quiet(scene.step())
    scene.builder = scene.builder.with_finalizers(FINALIZER)
    scene.step()
    scene.step()
    assert list(scene.pods) == ["demo-cleanup-1"]


# ---- bounds -----------------------------------------------------------------------------------------


def left_behind(scene: Scene) -> str:
    """The Warning with which it is given up; the run is let go."""
    scene.step()
    scene.step()
    assert released(scene) and scene.status.cleanup is not None
    assert scene.status.cleanup.result == "LeftBehind"
    event = scene.events[-1]
    assert event.reason == "CheckpointsLeftBehind" and event.warning
    assert f"s3://bucket/demo/{DELETES.uid}/" in event.message and "by hand" in event.message
    return event.message


def test_pods_that_do_not_end() -> None:
    scene = Scene(DELETES).started().stepping(10).edit(lambda b: b.deleting())
    scene.step()
    scene.step()
    scene.silence(GRACE + END_SECONDS - 1)
    assert quiet(scene.step()) and not released(scene)
    scene.silence(2)
    assert "demo-0-1" in left_behind(scene) and not any("cleanup" in name for name in scene.pods)


def test_a_garbage_collector_that_does_not_come() -> None:
    scene = deleted()
    scene.builder = scene.builder.with_finalizers(FINALIZER, "orphan")
    scene.silence(GRACE + END_SECONDS + 1)
    assert "orphan" in left_behind(scene)


def test_a_try_that_fails_is_tried_again_after_a_pause() -> None:
    scene = trying()
    for number in range(1, MAX_TRIES):
        name = f"demo-cleanup-{number}"
        said = json.dumps({"outcome": "failed", "message": "no route"})
        scene.put(replace(scene.pods[name], phase="Failed", exit_code=1, termination_message=said))
        scene.step()
        assert "no route" in scene.events[-1].message and scene.events[-1].warning
        waits = scene.step()
        assert not waits.create_pods and waits.requeue_after is not None
        scene.silence(waits.requeue_after)
        scene.step()
        assert f"demo-cleanup-{number + 1}" in scene.pods
    last = scene.pods[f"demo-cleanup-{MAX_TRIES}"]
    scene.put(replace(last, phase="Failed", exit_code=1, termination_message="", reason="DeadlineExceeded"))
    assert "DeadlineExceeded" in left_behind(scene)
    assert len(scene.pods) == MAX_TRIES


def test_what_a_retry_cannot_help_is_not_tried_again() -> None:
    scene = trying()
    failed(scene, code=contract.ExitCode.CONFIG, message="bucket 'bucket' does not exist")
    assert "bucket 'bucket' does not exist" in left_behind(scene)


def test_an_end_without_a_word_is_no_success() -> None:
    scene = trying()
    cleanup(scene, phase="Succeeded", exit_code=0, termination_message="")
    scene.step()
    assert scene.status.cleanup is not None
    assert (scene.status.cleanup.tries, scene.status.cleanup.result) == (2, "")


@pytest.mark.parametrize(
    ("state", "seconds", "words"),
    [
        ({"waiting_reason": "ImagePullBackOff", "waiting_message": "gone"}, TROUBLE_SECONDS, "gone"),
        ({"waiting_reason": "CreateContainerConfigError"}, TROUBLE_SECONDS, "CreateContainerConfigError"),
        ({"setup_trouble": "FailedMount: no claim"}, TROUBLE_SECONDS, "no claim"),
        ({"unschedulable": "no memory"}, START_SECONDS, "no memory"),
        ({}, START_SECONDS, "does not start"),
    ],
)
def test_a_pod_that_does_not_start(state: dict[str, Any], seconds: float, words: str) -> None:
    scene = trying()
    cleanup(scene, **state)
    scene.silence(seconds - 1)
    assert quiet(scene.step())
    scene.silence(2)
    assert words in left_behind(scene)


def test_a_pod_that_is_cut_off_is_replaced() -> None:
    scene = trying()
    cleanup(scene, phase="Running", node="far")
    scene.silence(START_SECONDS + WORK_SECONDS + TROUBLE_SECONDS + 1)
    decided = scene.step()
    assert [d.name for d in decided.delete_pods] == ["demo-cleanup-1"] and "far" in scene.events[-1].message
    assert scene.status.cleanup is not None and scene.status.cleanup.tries == 2


def test_a_pod_that_vanishes_is_made_again() -> None:
    scene = trying()
    scene.pods.clear()
    assert [c.name for c in scene.step().create_pods] == ["demo-cleanup-1"]
    scene.pods.clear()
    scene.silence(START_SECONDS + 1)
    scene.step()
    assert scene.status.cleanup is not None and scene.status.cleanup.tries == 2


def test_a_namespace_that_is_being_deleted_is_not_held_up() -> None:
    scene = deleted()
    scene.step()
    message = "unable to create new content in namespace team because it is being terminated"
    scene.refusals = (Refusal(pod="demo-cleanup-1", message=message, retry_at=scene.now + 1, hopeless=True),)
    assert "namespace is being deleted" in left_behind(scene)


def test_a_refused_pod_is_asked_for_again_until_the_bound() -> None:
    scene = deleted()
    scene.step()
    scene.refusals = (Refusal(pod="demo-cleanup-1", message="exceeded quota", retry_at=scene.now + 5),)
    waits = scene.step()
    assert not waits.create_pods and waits.requeue_after == pytest.approx(5)
    scene.silence(5)
    assert scene.plan().create_pods
    scene.silence(START_SECONDS)
    assert "exceeded quota" in left_behind(scene)


def test_an_operator_that_was_away_looks_before_it_gives_up() -> None:
    scene = trying()
    cleanup(scene, phase="Succeeded", exit_code=0, termination_message=DONE)
    scene.silence(100_000).restart_operator()
    scene.step()
    assert scene.status.cleanup is not None and scene.status.cleanup.result == "Deleted"


# ---- the pod ----------------------------------------------------------------------------------------


def body(**spec: Any) -> dict[str, Any]:
    return cleanup_pod(DELETES.with_spec(**spec).build(), 2)


def test_the_pod_is_the_runs_and_no_member() -> None:
    made = body()
    assert made["metadata"]["name"] == "demo-cleanup-2" and controlled_by(made, DELETES.uid)
    assert made["metadata"]["labels"][contract.LABEL_MANAGED_BY] == contract.MANAGED_BY
    assert cleanup_number("demo", made["metadata"]["name"]) == 2
    view = pod_view(made)
    assert (view.index, view.created_in) == (-1, 0)


@pytest.mark.parametrize(
    "name", ["demo-0-1", "demo-cleanup-1-1", "demo-cleanup-x", "other-cleanup-1", "demo"]
)
def test_other_pods_are_no_cleanup_pods(name: str) -> None:
    assert cleanup_number("demo", name) is None


def test_the_pod_is_restricted_and_bounded() -> None:
    spec = body()["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert spec["automountServiceAccountToken"] is False and spec["restartPolicy"] == "Never"
    assert spec["activeDeadlineSeconds"] == WORK_SECONDS
    assert int(container["args"][1]) < WORK_SECONDS, "it says how far it came before it is killed"


def test_the_pod_reaches_the_bucket_as_the_run_did() -> None:
    checkpoint = {
        "uri": "s3://b/p",
        "endpoint": "http://minio:9000",
        "credentialsSecret": {"name": "s3"},
        "deletionPolicy": "Delete",
    }
    made = body(
        checkpoint=checkpoint,
        env=[{"name": "AWS_CA_BUNDLE", "value": "/ca/ca.crt"}, {"name": "TRAINYARD_RUN_UID", "value": "x"}],
        envFrom=[{"secretRef": {"name": "e"}}],
        volumes=[{"name": "ca", "mountPath": "/ca", "configMap": {"name": "ca"}}],
        serviceAccountName="trainer",
        resources={"limits": {"nvidia.com/gpu": 8}},
        script={"configMap": {"name": "code"}},
        command=None,
    )
    (container,) = made["spec"]["containers"]
    env = {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}
    assert env["TRAINYARD_RUN_UID"] == DELETES.uid and env["TRAINYARD_CHECKPOINT_URI"] == "s3://b/p"
    assert (
        env["TRAINYARD_CHECKPOINT_ENDPOINT"] == "http://minio:9000" and env["AWS_CA_BUNDLE"] == "/ca/ca.crt"
    )
    assert env["AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "s3", "key": "AWS_ACCESS_KEY_ID"}}
    assert not [n for n in env if "COORDINATOR" in n or "TOKEN_FILE" in n or "COMMAND" in n]
    assert container["envFrom"] == [{"secretRef": {"name": "e"}}]
    assert made["spec"]["serviceAccountName"] == "trainer"
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    assert mounts == {"/tmp": "trainyard-tmp", "/ca": "ca"}  # noqa: S108
    assert {v["name"] for v in made["spec"]["volumes"]} == set(mounts.values())
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_a_tmp_of_the_users_own_is_mounted_once() -> None:
    made = body(volumes=[{"name": "mine", "mountPath": "/tmp", "emptyDir": {}}])  # noqa: S108
    assert [v["name"] for v in made["spec"]["volumes"]] == ["mine"]


def test_the_policy_is_read() -> None:
    assert CheckpointSpec(uri="s3://b", deletion_policy="Delete").deletes
    assert not CheckpointSpec(uri="s3://b").deletes
