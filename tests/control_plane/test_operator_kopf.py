"""kopf as the doorbell, against the real API server: it rings, it writes nothing, and it comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest

from devcluster.cluster import ControlPlane
from tests.control_plane.manifests import training_run
from tests.control_plane.operator_tools import Cluster, until
from tests.control_plane.server import Server
from trainyard_operator.kopf_host import KopfHost
from trainyard_operator.kube.credentials import load
from trainyard_operator.kube.session import connect


class Host:
    """A kopf host whose sessions the test can reach, and what it rang."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.plane = plane
        self.rings: list[tuple[str, str]] = []
        self.sessions: list[aiohttp.ClientSession] = []
        self.loops: list[asyncio.AbstractEventLoop] = []
        self.host = KopfHost(
            connect=self.connect, namespaces=[namespace], ring=lambda ns, name: self.rings.append((ns, name))
        )

    async def connect(self) -> tuple[str, aiohttp.ClientSession]:
        made = connect(load(self.plane.kubeconfig), user_agent="kopf-under-test")
        self.sessions.append(made.session)
        self.loops.append(asyncio.get_running_loop())
        return made.server, made.session


@pytest.fixture
async def host(control_plane: ControlPlane, namespace: str) -> AsyncIterator[Host]:
    made = Host(control_plane, namespace)
    made.host.start()
    yield made
    await made.host.stop()
    assert not made.host._thread.is_alive()
    assert all(session.closed for session in made.sessions)


@pytest.fixture
def cluster(control_plane: ControlPlane, server: Server, namespace: str) -> Cluster:
    return Cluster(server, namespace, control_plane.audit_log)


async def test_it_rings_for_every_change_and_writes_nothing(host: Host, cluster: Cluster) -> None:
    key = (cluster.namespace, "digits")
    made = cluster.apply(training_run())
    await until("a ring for the new run", lambda: key in host.rings)
    await asyncio.sleep(0.5)
    assert cluster.run("digits") == made, "not a byte of the object was touched"
    host.rings.clear()
    cluster.patch(f"{cluster.runs_path}/digits", {"spec": {"suspend": True}})
    await until("a ring for the change", lambda: key in host.rings)
    host.rings.clear()
    code = cluster.server.request("DELETE", f"{cluster.runs_path}/digits").code
    assert code == 200, "no finalizer holds it"
    await until("a ring for the deletion", lambda: key in host.rings)
    assert cluster.server.request("GET", f"{cluster.runs_path}/digits").code == 404


async def test_it_comes_back_when_it_fails(host: Host, cluster: Cluster) -> None:
    await until("the login", lambda: bool(host.sessions))
    await asyncio.sleep(0.5)
    (session,), (loop,) = host.sessions, host.loops
    asyncio.run_coroutine_threadsafe(session.close(), loop).result(5)  # what makes each request of kopf fail
    cluster.apply(training_run())
    await until("a ring after a new login", lambda: (cluster.namespace, "digits") in host.rings, seconds=60)
    assert len(host.sessions) > 1
    assert host.host.alive() == ""


async def test_it_stops_at_once_while_it_watches(host: Host, cluster: Cluster) -> None:
    await until("the login", lambda: bool(host.sessions))
    await asyncio.sleep(0.5)
    began = time.monotonic()
    await host.host.stop()
    assert not host.host._thread.is_alive(), f"alive after {time.monotonic() - began:.1f} s"
