"""What the kubelet says of a container that is not made, and when it is asked."""

from __future__ import annotations

from typing import Any

from tests.fakes.api import FakeApi
from tests.fakes.clock import FakeClock
from trainyard_operator.kube.api import CORE_EVENTS, ApiError
from trainyard_operator.observe import pod_view
from trainyard_operator.plan.deadlines import SETUP_SECONDS, being_created
from trainyard_operator.podevents import PodEvents, newest

CREATED = "2026-01-01T00:00:00Z"
UNIX = 1767225600.0
MOUNT = 'MountVolume.SetUp failed for volume "script" : configmap "digits" not found'


def _pod(uid: str = "u1", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": f"run-0-1-{uid}", "namespace": "team", "uid": uid, "creationTimestamp": CREATED},
        "spec": {"nodeName": "node-1"},
        "status": {"phase": "Pending", **status},
    }


def _event(uid: str, reason: str, message: str, at: str = CREATED, kind: str = "Warning") -> dict[str, Any]:
    return {
        "metadata": {"name": f"{uid}.{reason}.{at}", "namespace": "team"},
        "involvedObject": {"uid": uid},
        "type": kind,
        "reason": reason,
        "message": message,
        "lastTimestamp": at,
    }


def _world(*events: dict[str, Any], after: float) -> tuple[FakeApi, PodEvents]:
    api = FakeApi()
    for event in events:
        api.seed(CORE_EVENTS, event)
    return api, PodEvents(api, FakeClock(UNIX + after))


async def test_a_mount_that_fails_is_told() -> None:
    api, look = _world(
        _event("u1", "FailedMount", MOUNT),
        _event("u2", "FailedMount", "of another pod"),
        _event("u1", "Pulled", "not a complaint", kind="Normal"),
        after=SETUP_SECONDS,
    )
    assert await look.look([_pod()], {}) == {"u1": f"FailedMount: {MOUNT}"}
    assert len(api.calls) == 1


async def test_a_pod_that_is_young_or_has_a_reason_or_runs_costs_no_request() -> None:
    waiting = {"containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "ErrImagePull"}}}]}
    for pod, after in ((_pod(), SETUP_SECONDS - 1), (_pod(**waiting), 60), (_pod(phase="Running"), 60)):
        api, look = _world(_event("u1", "FailedMount", MOUNT), after=after)
        assert await look.look([pod], {"u1": "old"}) == {}
        assert api.calls == []


async def test_an_api_that_fails_keeps_what_was_known() -> None:
    api, look = _world(after=60)
    api.fail_next("list", ApiError(500, "InternalError", "no"))
    assert await look.look([_pod()], {"u1": "FailedMount: x"}) == {"u1": "FailedMount: x"}


def test_the_newest_counts_and_scheduling_does_not() -> None:
    older, later = "2026-01-01T00:00:01Z", "2026-01-01T00:00:09Z"
    events = [
        _event("u", "FailedMount", "second", later),
        _event("u", "FailedMount", "first", older),
        _event("u", "FailedScheduling", "over by now", "2026-01-01T00:00:10Z"),
    ]
    assert newest(events) == "FailedMount: second"
    assert newest([]) == ""


def test_only_a_pod_with_a_node_is_being_created() -> None:
    pod = _pod()
    assert being_created(pod_view(pod))
    pod["spec"] = {}
    assert not being_created(pod_view(pod))
