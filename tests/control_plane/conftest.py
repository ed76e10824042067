"""The control-plane level: real etcd, kube-apiserver and kube-controller-manager on loopback, no nodes.

One control plane for the session, with our CRD in it; each test has a namespace of its own. A test that needs
pods to run plays the kubelet itself, by writing their status. To look at it by hand while a test sleeps:
`kubectl --kubeconfig <control_plane.kubeconfig>`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from devcluster.cluster import ControlPlane
from tests.control_plane.server import RUNS, Server, connected
from trainyard_operator.kube.client import HttpApi
from trainyard_operator.kube.credentials import load
from trainyard_operator.kube.session import connect

REPOSITORY = Path(__file__).resolve().parents[2]
CRD = REPOSITORY / "crds" / "trainyard.dev_trainingruns.yaml"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The control plane, with the CRD established. `.kubeconfig`, `.kubectl(...)`, `.audit_log`."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as plane:
        plane.kubectl("apply", "--server-side", "-f", CRD)
        with connected(plane.kubeconfig) as server:
            _await_runs(server)
        yield plane


def _await_runs(server: Server) -> None:
    """Until the API serves runs. Not by `kubectl wait`, which fails on a CRD that has no conditions yet."""
    deadline = time.monotonic() + 30
    while (answer := server.request("GET", RUNS.format(namespace="default"))).code != 200:
        assert time.monotonic() < deadline, (
            f"trainingruns are not served 30 s after the CRD came: {answer.body}"
        )
        time.sleep(0.05)


@pytest.fixture(scope="session")
def server(control_plane: ControlPlane) -> Iterator[Server]:
    """Plain requests with the administrator's rights, and the answers as they are."""
    with connected(control_plane.kubeconfig) as made:
        yield made


@pytest.fixture(scope="session")
def make_namespace(server: Server) -> Callable[..., str]:
    """Makes a namespace, with its default service account (pods are refused without), and returns its name."""

    def make(**labels: str) -> str:
        name = f"test-{next(_numbers)}"
        server.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
        path = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        deadline = time.monotonic() + 30
        while server.request("GET", path).code != 200:
            assert time.monotonic() < deadline, f"no {path} within 30 s of the namespace's creation"
            time.sleep(0.02)
        return name

    return make


@pytest.fixture
def namespace(make_namespace: Callable[..., str], server: Server) -> Iterator[str]:
    """A namespace of this test's own. Its end is not waited for: it ends with the control plane at the latest."""
    name = make_namespace()
    yield name
    server.request("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture
async def api(control_plane: ControlPlane) -> AsyncIterator[HttpApi]:
    """The operator's own client, with the administrator's rights."""
    connection = connect(load(control_plane.kubeconfig), user_agent="trainyard-test")
    try:
        yield HttpApi(connection)
    finally:
        await connection.close()
