"""What of a run can be changed later, and by whom; what the status subresource separates."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.control_plane.manifests import training_run
from tests.control_plane.server import RUNS, Answer, Server
from trainyard_api.contract import Phase
from trainyard_api.v1alpha1 import (
    AttemptStatus,
    Cause,
    CheckpointStatus,
    CleanupStatus,
    Condition,
    NodesStatus,
    Restarts,
    Status,
)

CHANGES: dict[str, Any] = {
    "image": "other:2",
    "imagePullPolicy": "Never",
    "imagePullSecrets": [{"name": "other"}],
    "nodes": {"min": 3},
    "processesPerNode": 2,
    "script": {"configMap": {"name": "other"}},
    "args": ["--other"],
    "workingDir": "/other",
    "preload": ["other"],
    "env": [{"name": "A", "value": "other"}],
    "envFrom": [{"configMapRef": {"name": "other"}}],
    "resources": {"limits": {"cpu": 4}},
    "volumes": [{"name": "a", "mountPath": "/other", "emptyDir": {}}],
    "nodeSelector": {"a": "other"},
    "tolerations": [{"key": "other", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "other",
    "serviceAccountName": "other",
    "terminationGracePeriodSeconds": 60,
    "checkpoint": {"uri": "s3://bucket/other"},
    "determinism": "elastic",
    "virtualRanks": 4,
    "managedBy": "example.com/other",
}
REQUIRED = {"image", "nodes", "script", "checkpoint"}
DEFAULTED = {"processesPerNode", "terminationGracePeriodSeconds", "managedBy"}

FULL = {f"spec.{field}": value for field, value in CHANGES.items() if field not in REQUIRED}
"""Every optional field is set to what would elsewhere be a change."""

MUTABLE: dict[str, dict[str, Any]] = {
    "suspend": {"suspend": True},
    "deadline": {"activeDeadlineSeconds": 100},
    "ttl": {"ttlSecondsAfterFinished": 100},
    "restarts": {"restartPolicy": {"maxRestarts": 99, "backoffMaxSeconds": 120}},
    "all at once": {"suspend": True, "activeDeadlineSeconds": 1, "restartPolicy": {"noProgressLimit": 9}},
}

LOST = Cause(reason="PodLost", failure_class="infrastructure")
STATUS = Status(
    observed_generation=1,
    phase=Phase.RUNNING,
    attempt=2,
    nodes=NodesStatus(desired=2, ready=2, summary="2/2"),
    step=37,
    total_steps=100,
    epoch=1,
    loss=0.25,
    samples_per_second=812.5,
    progress="37%",
    best_step=37,
    checkpoint=CheckpointStatus(
        step=30, seq=4, uri="s3://bucket/runs/u/commits/00000004.json", time="2026-01-01T00:00:00Z", reason="steps",
        bytes=2**40, upload_seconds=1.5, stall_seconds=0.01,
    ),
    cleanup=CleanupStatus(
        start_time="2026-01-01T00:00:00Z", tries=1, try_time="2026-01-01T00:00:01Z", result="Deleted", message="all",
    ),
    restarts=Restarts(user=1, infrastructure=0, without_progress=0),
    root_cause=Cause(reason="WorkerFailed", failure_class="user", message="boom", rank=1, exit_code=-9, pod="digits-1-1"),
    attempts=[
        AttemptStatus(attempt=1, start_time="2026-01-01T00:00:00.000001Z", cause=LOST),
        AttemptStatus(attempt=2, resumed_step=30, lost_steps=4, recovery_seconds=0.5, pods_created=0),
    ],
    start_time="2026-01-01T00:00:00Z",
    active_since="2026-01-01T00:00:00Z",
    conditions=[
        Condition(type="Running", status="True", reason="Training", last_transition_time="2026-01-01T00:00:00Z"),
        Condition(
            type="Complete",
            status="False",
            reason="Created",
            last_transition_time="2026-01-01T00:00:00.5Z",
            observed_generation=1,
        ),
    ],
)  # fmt: skip


@pytest.fixture
def run(namespace: str, server: Server) -> str:
    """URL path of a stored minimal run."""
    server.create(RUNS.format(namespace=namespace), training_run())
    return f"{RUNS.format(namespace=namespace)}/digits"


@pytest.fixture
def full_run(namespace: str, server: Server) -> str:
    """URL path of a stored run that has every optional field but command."""
    server.create(RUNS.format(namespace=namespace), training_run(FULL))
    return f"{RUNS.format(namespace=namespace)}/digits"


def assert_immutable(answer: Answer, field: str) -> None:
    assert answer.code == 422, (answer.code, answer.message)
    wanted = f"Invalid value: {field} cannot be changed, create a new run for that"
    assert (f"spec.{field}", wanted) in answer.causes, answer.causes


@pytest.mark.parametrize("field", CHANGES)
def test_immutable(run: str, server: Server, field: str) -> None:
    assert_immutable(server.request("PATCH", run, {"spec": {field: CHANGES[field]}}), field)


def test_optional_fields_cannot_be_removed(full_run: str, server: Server) -> None:
    for field in sorted(set(CHANGES) - REQUIRED):
        assert_immutable(server.request("PATCH", full_run, {"spec": {field: None}}), field)


def test_script_cannot_become_a_command(run: str, server: Server) -> None:
    answer = server.request("PATCH", run, {"spec": {"script": None, "command": ["a.py"]}})
    assert_immutable(answer, "script")
    assert_immutable(answer, "command")


@pytest.mark.parametrize(
    "part",
    [
        {"interval": {"auto": True}},
        {"onException": True},
        {"keepBest": {"metric": "loss"}},
        {"resume": "required"},
        {"local": {"enabled": False}},
        {"deletionPolicy": "Delete"},
    ],
    ids=lambda part: next(iter(part)),
)
def test_no_part_of_checkpoint_can_be_changed(run: str, server: Server, part: dict[str, Any]) -> None:
    assert_immutable(server.request("PATCH", run, {"spec": {"checkpoint": part}}), "checkpoint")


def test_parts_of_lists_cannot_be_changed(full_run: str, server: Server) -> None:
    patch = [{"op": "add", "path": "/spec/env/-", "value": {"name": "B"}}]
    assert_immutable(
        server.request("PATCH", full_run, patch, content_type="application/json-patch+json"), "env"
    )


@pytest.mark.parametrize("case", MUTABLE)
def test_mutable(run: str, server: Server, case: str) -> None:
    answer = server.request("PATCH", run, {"spec": MUTABLE[case]})
    assert answer.code == 200, answer.message
    for field, value in MUTABLE[case].items():
        stored = answer.body["spec"][field]
        assert stored == (stored | value if isinstance(value, dict) else value)
    assert answer.body["metadata"]["generation"] == 2


def test_mutable_fields_keep_their_rules(run: str, server: Server) -> None:
    answer = server.request("PATCH", run, {"spec": {"restartPolicy": {"backoffMaxSeconds": 0}}})
    assert answer.code == 422
    assert answer.causes[0][0] == "spec.restartPolicy.backoffMaxSeconds"


def test_the_same_again_is_no_change(full_run: str, server: Server) -> None:
    """What `kubectl apply` of an unchanged file sends, for every field."""
    stored = server.request("GET", full_run).body
    answer = server.request("PUT", full_run, copy.deepcopy(stored))
    assert answer.code == 200, answer.message
    assert answer.body["metadata"]["resourceVersion"] == stored["metadata"]["resourceVersion"]


def test_a_status_in_the_main_resource_is_ignored(run: str, server: Server) -> None:
    answer = server.request("PATCH", run, {"status": {"phase": "Complete"}, "spec": {"suspend": True}})
    assert answer.code == 200
    assert "status" not in answer.body


def test_the_status_subresource_changes_the_status_only(run: str, server: Server) -> None:
    answer = server.request("PATCH", f"{run}/status", {"status": STATUS.to_json(), "spec": {"suspend": True}})
    assert answer.code == 200, answer.message
    assert answer.body["spec"]["suspend"] is False
    assert answer.body["metadata"]["generation"] == 1


def test_the_status_keeps_every_field(run: str, server: Server) -> None:
    """Nothing of what the operator writes is dropped by the schema, and it reads back as it was."""
    answer = server.request(
        "PATCH", f"{run}/status", {"status": STATUS.to_json()}, query={"fieldValidation": "Strict"}
    )
    assert answer.code == 200, answer.message
    assert Status.from_json(answer.body["status"]) == STATUS


def test_the_first_status_of_all_is_accepted(run: str, server: Server) -> None:
    """All defaults of the dataclasses, as when nothing was started yet."""
    status = Status(phase=Phase.PENDING)
    answer = server.request(
        "PATCH", f"{run}/status", {"status": status.to_json()}, query={"fieldValidation": "Strict"}
    )
    assert answer.code == 200, answer.message
    assert Status.from_json(answer.body["status"]) == status


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("phase", "Sleeping"),
        ("attempt", -1),
        ("attempts", [{"attempt": n} for n in range(11)]),
        ("rootCause", {"reason": "X", "class": "mystery"}),
        ("conditions", [{"type": "Running"}]),
    ],
)
def test_a_bad_status_is_refused(run: str, server: Server, field: str, value: Any) -> None:
    answer = server.request("PATCH", f"{run}/status", {"status": {field: value}})
    assert answer.code == 422
    assert all(name.startswith(f"status.{field}") for name, _ in answer.causes if name != "<nil>"), (
        answer.causes
    )


def test_a_stale_status_write_conflicts(run: str, server: Server) -> None:
    """The fence of status.attempt (docs/architecture.md 1.4) stands on this."""
    version = server.request("GET", run).body["metadata"]["resourceVersion"]
    write = {"metadata": {"resourceVersion": version}, "status": {"attempt": 1}}
    assert server.request("PATCH", f"{run}/status", write).code == 200
    assert server.request("PATCH", f"{run}/status", write | {"status": {"attempt": 2}}).code == 409
