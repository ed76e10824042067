"""From objects to what the planner reads."""

from __future__ import annotations

from typing import Any

import pytest

from tests.builders import RUN_UID, SETTINGS, T0, a_run
from trainyard_operator.observe import observe, pod_view
from trainyard_operator.plan.pods import desired_pod
from trainyard_operator.plan.times import rfc3339


def pod(index: int = 0, attempt: int = 1, **status: Any) -> dict[str, Any]:
    body = desired_pod(a_run().with_status({"attempt": attempt}).build(), index, SETTINGS)
    body["metadata"] |= {"uid": f"uid-{index}", "creationTimestamp": rfc3339(T0)}
    body["spec"]["nodeName"] = "node-0"
    return {**body, "status": {"phase": "Pending", **status}}


def container(**state: Any) -> dict[str, Any]:
    return {
        "containerStatuses": [
            {"name": "sidecar", "state": {"running": {}}},
            {"name": "trainer", "state": state},
        ]
    }


def test_a_running_pod() -> None:
    view = pod_view(
        pod(1, 3, phase="Running", podIP="10.0.0.7", **container(running={"startedAt": rfc3339(T0 + 4)}))
    )
    assert (view.name, view.uid, view.index, view.created_in) == ("demo-1-3", "uid-1", 1, 3)
    assert (view.phase, view.ip, view.node) == ("Running", "10.0.0.7", "node-0")
    assert (view.creation_time, view.started_at, view.deleting) == (T0, T0 + 4, False)


def test_a_pod_that_cannot_start() -> None:
    waiting = {"reason": "ErrImagePull", "message": "not found"}
    view = pod_view(pod(**container(waiting=waiting)))
    assert (view.waiting_reason, view.waiting_message) == ("ErrImagePull", "not found")


def test_a_pod_that_no_node_takes() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    assert pod_view(pod(conditions=[condition])).unschedulable == "0/3 nodes"
    assert pod_view(pod(conditions=[condition | {"status": "True"}])).unschedulable == ""


def test_a_pod_that_ended() -> None:
    ended = {"exitCode": 137, "reason": "OOMKilled", "message": "last words", "startedAt": rfc3339(T0)}
    view = pod_view(pod(phase="Failed", reason="Evicted", message="disk", **container(terminated=ended)))
    assert (view.exit_code, view.terminated_reason, view.termination_message) == (
        137,
        "OOMKilled",
        "last words",
    )
    assert (view.reason, view.message, view.started_at) == ("Evicted", "disk", T0)


def test_a_disruption_is_a_reason() -> None:
    target = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "m"}
    view = pod_view(pod(phase="Running", conditions=[target]))
    assert (view.reason, view.message) == ("PreemptionByScheduler", "m")
    assert pod_view(pod(conditions=[target | {"status": "False"}])).reason == ""


def test_ownership_is_by_uid_never_by_labels() -> None:
    ours, other, orphan, guest = pod(0), pod(1), pod(2), pod(3)
    other["metadata"]["ownerReferences"][0]["uid"] = "another-run"
    del orphan["metadata"]["ownerReferences"]
    guest["metadata"]["ownerReferences"][0]["controller"] = False
    seen = observe(a_run().object(), [ours, other, orphan, guest], {}, now=T0)
    assert [p.name for p in seen.pods] == ["demo-0-1"]


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"trainyard.dev/node-index": "x"},
        {"trainyard.dev/node-index": "7", "trainyard.dev/created-in-attempt": "9"},
        None,
    ],
)
def test_labels_that_were_edited_do_not_move_a_pod(labels: Any) -> None:
    edited = pod(1, 3)
    edited["metadata"]["labels"] = labels
    view = pod_view(edited)
    assert (view.index, view.created_in) == (1, 3)


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"metadata": None, "status": []},
        {"metadata": {"name": 7, "labels": []}, "status": {"containerStatuses": {}, "conditions": "x"}},
        {
            "status": {
                "containerStatuses": [None, {"name": "trainer", "state": {"terminated": {"exitCode": "1"}}}]
            }
        },
        {
            "metadata": {"creationTimestamp": 5},
            "spec": {"nodeName": None},
            "status": {"phase": None, "podIP": 4},
        },
    ],
)
def test_a_pod_is_never_too_odd_to_be_seen(odd: dict[str, Any]) -> None:
    view = pod_view(odd)
    assert (view.index, view.created_in, view.phase) == (-1, 0, "Pending")


BAD_RUNS: list[tuple[dict[str, Any], str]] = [
    (a_run().with_spec(image=7).object(), "spec.image"),
    (a_run().with_spec(nodes={}).object(), "spec.nodes.min"),
    (a_run().with_spec(nodes={"min": 0}).object(), "spec.nodes"),
    (a_run().with_status({"attempt": "x"}).object(), "status.attempt"),
    ({"metadata": {"name": "x"}}, "namespace"),
    ({"metadata": []}, "not a TrainingRun"),
]


@pytest.mark.parametrize(("obj", "said"), BAD_RUNS)
def test_a_bad_run_is_a_value_error_that_names_the_field(obj: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        observe(obj, [], {}, now=T0)


def test_what_is_observed_is_passed_on() -> None:
    seen = observe(a_run().object(), [], {}, now=T0, listening_since=T0 - 5, status_written=T0 - 1)
    assert (seen.run.uid, seen.now, seen.listening_since, seen.status_written) == (
        RUN_UID,
        T0,
        T0 - 5,
        T0 - 1,
    )
