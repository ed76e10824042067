"""The operator as a process: its rights, its probes, its lease, its end, and a network that breaks."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from devcluster.cluster import ControlPlane
from tests.control_plane.manifests import training_run
from tests.control_plane.operator_tools import Cluster, Operator, Proxy, until
from tests.control_plane.server import Server


@pytest.fixture
def cluster(control_plane: ControlPlane, server: Server, namespace: str) -> Cluster:
    return Cluster(server, namespace, control_plane.audit_log)


@pytest.fixture
def operator(
    control_plane: ControlPlane, server: Server, namespace: str, tmp_path: Path
) -> Iterator[Operator]:
    made = Operator(control_plane.kubeconfig, server, namespace, tmp_path)
    try:
        yield made
    finally:
        made.stop_all()


@pytest.fixture
async def proxy(control_plane: ControlPlane) -> AsyncIterator[Proxy]:
    async with Proxy.to(control_plane.server) as made:
        yield made


async def test_it_works_with_no_more_rights_than_deployed(operator: Operator, cluster: Cluster) -> None:
    process = await operator.ready()
    cluster.apply(training_run())
    await until("two pods", lambda: len(cluster.pods()) == 2)
    assert "Forbidden" not in process.log and "403" not in process.log
    await until("kopf to watch", lambda: "trainyard_kopf_starts_total 1.0" in process.web("/metrics")[1])
    run = cluster.run("digits")
    assert "finalizers" not in run["metadata"] and "annotations" not in run["metadata"]


async def test_probes_and_metrics(operator: Operator, cluster: Cluster) -> None:
    process = await operator.ready()
    assert process.web("/healthz") == (200, "[+] loop\n[+] watches\n[+] workers\n[+] kopf\n")
    assert process.web("/readyz")[0] == 200
    text = process.web("/metrics")[1]
    for line in (
        "trainyard_leader 1.0",
        'trainyard_cache_objects{resource="pods"} 0.0',
        'trainyard_cache_objects{resource="trainingruns"} 0.0',
        'trainyard_api_requests_total{code="200",resource="pods",verb="LIST"} 1.0',
    ):
        assert line in text.splitlines(), text


async def test_sigterm_gives_the_lease_back_and_ends_with_0(operator: Operator, cluster: Cluster) -> None:
    process = await operator.ready()
    assert await process.end() == 0
    lease = cluster.server.request(
        "GET", f"/apis/coordination.k8s.io/v1/namespaces/{cluster.namespace}/leases/{operator.lease}"
    ).body
    assert not lease["spec"].get("holderIdentity")
    assert "Traceback" not in process.log, process.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
async def test_a_standby_takes_over(operator: Operator, cluster: Cluster, number: signal.Signals) -> None:
    leader = await operator.ready(TRAINYARD_IDENTITY="first")
    standby = operator.start(TRAINYARD_IDENTITY="second")
    await until("the standby to stand by", lambda: "first leads" in standby.web("/readyz")[1])
    code, text = standby.web("/readyz")
    assert code == 503 and "[-] leader: first leads" in text and "[+] caches" in text
    assert standby.web("/healthz")[0] == 200, "a standby is well"
    cluster.apply(training_run(name="one"))
    await until("pods", lambda: len(cluster.pods()) == 2)
    await leader.end(number)
    await standby.until_ready()
    cluster.apply(training_run(name="two"))
    await until("pods of the second run", lambda: len(cluster.pods()) == 4)
    await asyncio.sleep(3.5)  # its Events, and the status that waits for the interval of 2 s
    began = time.time()
    await asyncio.sleep(1)
    assert cluster.operator_writes(began) == []


async def test_a_leader_that_was_frozen_ends_instead_of_writing(operator: Operator, cluster: Cluster) -> None:
    leader = await operator.ready(TRAINYARD_IDENTITY="first")
    standby = operator.start(TRAINYARD_IDENTITY="second")
    await until("the standby to stand by", lambda: "first leads" in standby.web("/readyz")[1])
    leader.popen.send_signal(signal.SIGSTOP)
    await standby.until_ready()
    leader.popen.send_signal(signal.SIGCONT)
    assert await asyncio.to_thread(leader.popen.wait, 30) == 1
    assert "the lease is lost" in leader.log


async def test_broken_connections_are_made_again(operator: Operator, cluster: Cluster, proxy: Proxy) -> None:
    process = operator.start(server=proxy.url, TRAINYARD_LEASE_DURATION="15")
    await process.until_ready()
    cluster.apply(training_run(name="before"))
    await until("pods", lambda: len(cluster.pods()) == 2)
    proxy.cut = True
    proxy.break_all()
    cluster.apply(training_run(name="during"))
    await asyncio.sleep(3)
    proxy.cut = False
    await until("pods of the run that was made meanwhile", lambda: len(cluster.pods()) == 4)
    assert process.alive, process.log
    assert process.web("/healthz")[0] == 200


async def test_without_its_certificate_it_says_so(operator: Operator, tmp_path: Path) -> None:
    process = operator.start(TRAINYARD_COORDINATOR_CERT=str(tmp_path / "missing.crt"))
    assert await asyncio.to_thread(process.popen.wait, 30) == 2
    assert "TRAINYARD_COORDINATOR_CERT" in process.log and "missing.crt" in process.log


async def test_a_port_that_is_taken_ends_it(operator: Operator) -> None:
    first = await operator.ready()
    ports = first.ports()
    assert ports is not None
    second = operator.start(TRAINYARD_WEB_BIND=f"127.0.0.1:{ports[0]}")
    assert await asyncio.to_thread(second.popen.wait, 30) == 1
    assert "address already in use" in second.log.lower()
