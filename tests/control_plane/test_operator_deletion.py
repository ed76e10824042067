"""deletionPolicy Delete against the real API server and its garbage collector; the test is the kubelet.

What a crash between any two writes does is looked for in tests/unit/test_plan_machine.py. Here the operator is killed
wherever the deletion waits for somebody else, and what it waits for happens while it is away.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devcluster.cluster import ControlPlane
from tests.control_plane.manifests import checkpoint
from tests.control_plane.operator_tools import Agent, Cluster, Operator, living, until
from tests.control_plane.server import Server
from tests.control_plane.test_operator_lifecycle import Stage
from trainyard_api.contract import FINALIZER

DELETE = {"uri": "s3://bucket/runs", "deletionPolicy": "Delete"}
RUN = "digits"
CLEANUP = f"{RUN}-cleanup-1"
HOLD = "example.com/test"
GONE = {"outcome": "deleted", "message": "12 objects, 34 bytes"}


@pytest.fixture
def restricted(make_namespace: Callable[..., str], server: Server) -> Iterator[str]:
    """A namespace that takes restricted pods only."""
    name = make_namespace(**{"pod-security.kubernetes.io/enforce": "restricted"})
    yield name
    server.request("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture
def cluster(control_plane: ControlPlane, server: Server, restricted: str) -> Cluster:
    return Cluster(server, restricted, control_plane.audit_log)


@pytest.fixture
def operator(
    control_plane: ControlPlane, server: Server, restricted: str, tmp_path: Path
) -> Iterator[Operator]:
    made = Operator(control_plane.kubeconfig, server, restricted, tmp_path)
    try:
        yield made
    finally:
        made.stop_all()


@pytest.fixture
async def stage(cluster: Cluster, operator: Operator) -> Stage:
    return Stage(cluster, operator, await operator.ready())


async def training(stage: Stage, spec: dict[str, Any] = DELETE) -> list[Agent]:
    """A run whose two pods are up. Its agents are silent."""
    agents = await stage.gang(RUN, checkpoint=spec)
    if spec.get("deletionPolicy") == "Delete":
        meta = stage.cluster.run(RUN)["metadata"]
        assert meta["finalizers"] == [FINALIZER] and meta["generation"] == 1, "the spec is its author's"
    return agents


def delete(cluster: Cluster, how: str = "Background") -> None:
    options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": how}
    answer = cluster.server.request("DELETE", f"{cluster.runs_path}/{RUN}", options)
    assert answer.code == 200, answer.body


def exists(cluster: Cluster) -> bool:
    return cluster.server.request("GET", f"{cluster.runs_path}/{RUN}").code == 200


def names(cluster: Cluster) -> list[str]:
    return [p["metadata"]["name"] for p in cluster.server.request("GET", cluster.pods_path).body["items"]]


async def cleanup_pod(cluster: Cluster, name: str = CLEANUP) -> None:
    await until(f"pod {name}", lambda: names(cluster) == [name], seconds=60)


def play(cluster: Cluster, phase: str, code: int = 0, message: str = "", name: str = CLEANUP) -> None:
    """The kubelet says how the cleanup pod is."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ended = {"terminated": {"exitCode": code, "message": message, "startedAt": now, "finishedAt": now}}
    state = {"running": {"startedAt": now}} if phase == "Running" else ended
    container = {
        "name": "cleanup", "ready": False, "restartCount": 0, "image": "x", "imageID": "x", "state": state,
    }  # fmt: skip
    status = {"phase": phase, "containerStatuses": [container]}
    cluster.patch(f"{cluster.pods_path}/{name}/status", {"status": status})


def events(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """By reason."""
    path = f"/apis/events.k8s.io/v1/namespaces/{cluster.namespace}/events"
    return {e["reason"]: e for e in cluster.server.request("GET", path).body["items"]}


async def gone(cluster: Cluster) -> None:
    await until("the run to be gone", lambda: not exists(cluster), seconds=60)
    await until("its pods to be collected", lambda: not names(cluster), seconds=60)


async def test_a_run_goes_with_its_checkpoints(stage: Stage) -> None:
    cluster = stage.cluster
    async with living(await training(stage)) as agents:
        await stage.training(1)
        uid = agents[0].run_uid
        delete(cluster)
        await cleanup_pod(cluster)
    assert exists(cluster) and cluster.status(RUN)["cleanup"]["tries"] == 1
    (pod,) = cluster.pods()
    (container,) = pod["spec"]["containers"]
    env = {v["name"]: v.get("value") for v in container["env"]}
    assert container["command"] == ["python3", "-m", "trainyard.checkpoint.delete"]
    assert (env["TRAINYARD_CHECKPOINT_URI"], env["TRAINYARD_RUN_UID"]) == ("s3://bucket/runs", uid)
    play(cluster, "Running")
    play(cluster, "Succeeded", message=json.dumps(GONE))
    await gone(cluster)
    await until("the Event", lambda: "CheckpointsDeleted" in events(cluster))
    told = events(cluster)["CheckpointsDeleted"]
    assert GONE["message"] in told["note"] and f"s3://bucket/runs/{uid}/" in told["note"]
    assert stage.process is not None
    assert 'trainyard_checkpoint_deletions_total{result="Deleted"} 1.0' in stage.process.web("/metrics")[1]
    assert "Forbidden" not in stage.process.log and "Traceback" not in stage.process.log


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
async def test_the_operator_may_die_wherever_the_deletion_waits(stage: Stage, number: signal.Signals) -> None:
    cluster = stage.cluster
    await training(stage)
    for pod in cluster.pods():  # they end when the test says so
        cluster.patch(f"{cluster.pods_path}/{pod['metadata']['name']}", {"metadata": {"finalizers": [HOLD]}})

    async def away(happens: Callable[[], None]) -> None:
        """The operator ends, this happens, another operator starts."""
        assert stage.process is not None
        await stage.process.end(number)
        happens()
        stage.process = await stage.operator.ready()

    await away(lambda: delete(cluster))
    await until("the first step to be written", lambda: cluster.status(RUN).get("cleanup"))
    begun = cluster.status(RUN)["cleanup"]["startTime"]
    await until("all pods to be deleted", lambda: not cluster.pods())
    assert len(names(cluster)) == 2, "they are held"

    def pods_end() -> None:
        for name in names(cluster):
            cluster.patch(f"{cluster.pods_path}/{name}", {"metadata": {"finalizers": None}})

    await away(pods_end)
    await cleanup_pod(cluster)
    (first,) = [p["metadata"]["uid"] for p in cluster.pods()]
    await away(lambda: play(cluster, "Running"))
    await away(lambda: None)
    assert [p["metadata"]["uid"] for p in cluster.pods()] == [first], "the same pod, and one only"
    cleanup = cluster.status(RUN)["cleanup"]
    assert (cleanup["startTime"], cleanup["tries"]) == (begun, 1), "its clock is not set back"
    await away(lambda: play(cluster, "Succeeded", message=json.dumps(GONE)))
    await gone(cluster)


async def test_what_cannot_be_deleted_stays_and_a_warning_says_so(stage: Stage) -> None:
    cluster = stage.cluster
    await training(stage)
    uid = cluster.run(RUN)["metadata"]["uid"]
    delete(cluster)
    await cleanup_pod(cluster)
    words = "bucket 'bucket' does not exist"
    play(cluster, "Failed", 78, json.dumps({"outcome": "failed", "message": words}))
    await gone(cluster)
    await until("the Event", lambda: "CheckpointsLeftBehind" in events(cluster))
    told = events(cluster)["CheckpointsLeftBehind"]
    assert told["type"] == "Warning" and words in told["note"] and f"s3://bucket/runs/{uid}/" in told["note"]


async def test_a_try_that_failed_is_followed_by_another_pod(stage: Stage) -> None:
    cluster = stage.cluster
    await training(stage)
    delete(cluster)
    await cleanup_pod(cluster)
    play(cluster, "Failed", 1, json.dumps({"outcome": "failed", "message": "no route"}))
    await until("the second pod", lambda: f"{RUN}-cleanup-2" in names(cluster), seconds=60)
    cleanup = cluster.status(RUN)["cleanup"]
    assert cleanup["tries"] == 2 and "no route" in cleanup["message"]
    play(cluster, "Succeeded", message=json.dumps(GONE), name=f"{RUN}-cleanup-2")
    await gone(cluster)


@pytest.mark.parametrize("how", ["Foreground", "Orphan"])
async def test_the_garbage_collector_does_not_take_the_cleanup_pod(stage: Stage, how: str) -> None:
    """In the foreground it deletes every child of the run, asked for by `kubectl delete --cascade=foreground`."""
    cluster = stage.cluster
    await training(stage)
    delete(cluster, how)
    if how == "Orphan":
        await until("the pods to be nobody's", lambda: CLEANUP in names(cluster), seconds=60)
        for name in names(cluster):
            if name != CLEANUP:
                cluster.server.request("DELETE", f"{cluster.pods_path}/{name}")
    await cleanup_pod(cluster)
    (pod,) = cluster.pods()
    play(cluster, "Running")
    play(cluster, "Succeeded", message=json.dumps(GONE))
    await gone(cluster)
    assert "CheckpointsDeleted" in events(cluster) and "CheckpointsLeftBehind" not in events(cluster), pod


async def test_a_namespace_that_is_deleted_does_not_hang(stage: Stage) -> None:
    cluster = stage.cluster
    await training(stage)
    path = f"/api/v1/namespaces/{cluster.namespace}"
    assert cluster.server.request("DELETE", path).code == 200
    await until(
        "the namespace to be gone", lambda: cluster.server.request("GET", path).code == 404, seconds=90
    )
    assert stage.process is not None
    assert "namespace is being deleted" in stage.process.log, "nobody can read an Event there"


async def test_a_deleted_run_may_be_freed_by_hand(stage: Stage) -> None:
    cluster = stage.cluster
    await training(stage)
    delete(cluster)
    await cleanup_pod(cluster)
    cluster.patch(f"{cluster.runs_path}/{RUN}", {"metadata": {"finalizers": None}})
    await gone(cluster)


async def test_a_run_that_keeps_its_checkpoints_is_not_touched(stage: Stage) -> None:
    cluster = stage.cluster
    await training(stage, checkpoint(deletionPolicy="Retain")["spec.checkpoint"])
    assert "finalizers" not in cluster.run(RUN)["metadata"]
    delete(cluster)
    await gone(cluster)
    patches = [
        entry["requestURI"]
        for line in cluster.audit_log.read_text().splitlines()
        if (entry := json.loads(line))["verb"] == "patch"
        and (entry.get("objectRef") or {}).get("resource") == "trainingruns"
        and (entry.get("objectRef") or {}).get("namespace") == cluster.namespace
    ]
    assert patches and all(uri.split("?")[0].endswith("/status") for uri in patches), patches
