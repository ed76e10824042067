"""kopf as the doorbell, against the real API server: it rings, it writes nothing, and it comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from devcluster.cluster import ControlPlane
from tests.control_plane.manifests import training_run
from tests.control_plane.operator_tools import Cluster, Proxy, until
from tests.control_plane.server import Server
from trainyard_operator.kopf_host import KopfHost
from trainyard_operator.kube.credentials import load
from trainyard_operator.kube.session import connect


class Host:
    """A kopf host behind a proxy, and what it rang."""

    def __init__(self, kubeconfig: Path, proxy: Proxy, namespace: str) -> None:
        self.kubeconfig = kubeconfig
        self.proxy = proxy
        self.user = ""
        """Impersonated by sessions that are made from now on."""
        self.rings: list[tuple[str, str]] = []
        self.sessions: list[aiohttp.ClientSession] = []
        self.host = KopfHost(
            connect=self.connect, namespaces=[namespace], ring=lambda ns, name: self.rings.append((ns, name))
        )

    async def connect(self) -> tuple[str, aiohttp.ClientSession]:
        made = connect(load(self.kubeconfig), user_agent="kopf-under-test")
        if self.user:
            made.session.headers["Impersonate-User"] = self.user
        self.sessions.append(made.session)
        return self.proxy.url, made.session


@pytest.fixture
async def host(control_plane: ControlPlane, namespace: str) -> AsyncIterator[Host]:
    async with Proxy.to(control_plane.server) as proxy:
        made = Host(control_plane.kubeconfig, proxy, namespace)
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


async def test_it_goes_on_after_an_outage(host: Host, cluster: Cluster) -> None:
    await until("the login", lambda: bool(host.sessions))
    await asyncio.sleep(0.5)
    host.proxy.cut = True
    host.proxy.break_all()
    cluster.apply(training_run())
    await asyncio.sleep(2)
    host.proxy.cut = False
    await until("a ring", lambda: (cluster.namespace, "digits") in host.rings, seconds=60)


async def test_it_is_started_again_when_it_gives_up(host: Host, cluster: Cluster) -> None:
    """kopf ends at the first 403 of a watch; the rights come later."""
    await until("the login", lambda: bool(host.sessions))
    host.user = "nobody"
    host.sessions[0].headers["Impersonate-User"] = "nobody"
    host.proxy.break_all()
    await until("kopf to give up and be started again", lambda: host.host.starts > 1, seconds=60)
    assert host.host.alive() == ""
    host.user = ""
    cluster.apply(training_run())
    await until("a ring", lambda: (cluster.namespace, "digits") in host.rings, seconds=60)
    assert len(host.sessions) > 1


async def test_it_stops_at_once_while_it_watches(host: Host, cluster: Cluster) -> None:
    await until("the login", lambda: bool(host.sessions))
    await asyncio.sleep(0.5)
    began = time.monotonic()
    await host.host.stop()
    assert not host.host._thread.is_alive(), f"alive after {time.monotonic() - began:.1f} s"
