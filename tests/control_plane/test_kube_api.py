"""The real API server keeps the contract that the fake was written after, and our client speaks to it well."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import kopf
import pytest
import yaml

from devcluster.cluster import ControlPlane
from tests.control_plane.manifests import training_run
from tests.fakes.api_contract import CHECKS, Check, a_lease, refused
from tests.fakes.tcp_proxy import proxied
from trainyard_operator.kube.api import CRDS, EVENTS, LEASES, RUNS, TOKEN_REVIEWS, ApiError
from trainyard_operator.kube.client import HttpApi
from trainyard_operator.kube.credentials import Credentials, FileToken, load
from trainyard_operator.kube.lease import LeaderElector, Timing
from trainyard_operator.kube.recorder import MAX_NOTE, Recorder, Regarding
from trainyard_operator.kube.session import connect

SECONDS = 30.0
QUICK = Timing(lease_duration=4.0, renew_deadline=3.0, retry_period=0.2)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
async def test_contract(check: Check, api: HttpApi, namespace: str) -> None:
    await check(api, namespace)


async def test_a_watch_ends_when_it_was_asked_to(api: HttpApi, namespace: str) -> None:
    listed = await api.list(LEASES, namespace)
    version = listed["metadata"]["resourceVersion"]
    async with asyncio.timeout(SECONDS):
        found = [
            e.type async for e in api.watch(LEASES, namespace, resource_version=version, timeout_seconds=3)
        ]
    assert set(found) <= {"BOOKMARK"}


async def test_a_frozen_network_is_noticed(control_plane: ControlPlane, api: HttpApi, namespace: str) -> None:
    credentials = load(control_plane.kubeconfig)
    version = (await api.list(LEASES, namespace))["metadata"]["resourceVersion"]
    async with proxied(credentials.server) as proxy:
        connection = connect(Credentials(proxy.url, credentials.tls))
        through = HttpApi(connection, read_seconds=1, write_seconds=1, inactivity_seconds=1.5)
        try:
            stream: Any = through.watch(LEASES, namespace, resource_version=version)
            await api.create(LEASES, namespace, a_lease("seen"))
            assert (await anext(stream)).object["metadata"]["name"] == "seen"
            proxy.freeze()
            with pytest.raises(ApiError, match="Inactive"):
                await anext(stream)
            with pytest.raises(ApiError, match="Timeout"):
                await through.create(LEASES, namespace, a_lease("never"))
        finally:
            await connection.close()


async def test_service_account_tokens_and_reviews(
    control_plane: ControlPlane, api: HttpApi, namespace: str, tmp_path: Any
) -> None:
    """A token file as in a pod: refused when wrong, read again, and then it is who it says."""
    token = control_plane.kubectl("create", "token", "default", "-n", namespace).strip()
    file = tmp_path / "token"
    file.write_text("wrong")
    admin = load(control_plane.kubeconfig)
    # Without the administrator's client certificate.
    config = yaml.safe_load(control_plane.kubeconfig.read_text())
    config["users"][0]["user"] = {"tokenFile": str(file)}
    plain = tmp_path / "kubeconfig"
    plain.write_text(yaml.safe_dump(config))
    credentials = load(plain)
    assert isinstance(credentials.token, FileToken) and credentials.server == admin.server
    connection = connect(credentials)
    try:
        ours = HttpApi(connection)
        assert (await refused(ours.list(LEASES, namespace)))[0] == 401
        file.write_text(token)
        with pytest.raises(ApiError) as info:
            await ours.list(LEASES, namespace)
        assert info.value.status == 403 and f"{namespace}:default" in info.value.message
    finally:
        await connection.close()
    body = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token},
    }
    review = await api.create(TOKEN_REVIEWS, None, body)
    assert review["status"]["user"]["username"] == f"system:serviceaccount:{namespace}:default"


async def test_cluster_scoped_objects(api: HttpApi) -> None:
    found = await api.get(CRDS, None, "trainingruns.trainyard.dev")
    assert found["spec"]["names"]["kind"] == "TrainingRun"


async def test_kopf_and_our_client_share_one_pool(control_plane: ControlPlane, namespace: str) -> None:
    """kopf logs in with a lent session, sees a run, stops and closes what it was lent; ours goes on."""
    connection = connect(load(control_plane.kubeconfig))
    api = HttpApi(connection)
    registry, seen = kopf.OperatorRegistry(), asyncio.Event()
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.posting.enabled = False

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        return kopf.AiohttpSession(server=connection.server, aiohttp_session=connection.lend())

    @kopf.on.event(RUNS.group, RUNS.version, RUNS.plural, registry=registry)
    async def doorbell(**_: Any) -> None:
        seen.set()

    stop = asyncio.Event()
    operator = asyncio.create_task(
        kopf.operator(
            registry=registry,
            settings=settings,
            namespaces=[namespace],
            standalone=True,
            stop_flag=stop,
        )
    )
    try:
        await api.create(RUNS, namespace, training_run(name="r"))
        async with asyncio.timeout(SECONDS):
            await seen.wait()
        stop.set()
        async with asyncio.timeout(SECONDS):
            await operator
        assert (await api.get(RUNS, namespace, "r"))["metadata"]["name"] == "r"
    finally:
        operator.cancel()
        await asyncio.gather(operator, return_exceptions=True)
        await connection.close()


# ---- lease ------------------------------------------------------------------------------------------


async def test_two_candidates_hand_over_on_release_and_on_loss(
    control_plane: ControlPlane, api: HttpApi, namespace: str
) -> None:
    credentials = load(control_plane.kubeconfig)
    lost: list[str] = []
    async with proxied(credentials.server) as proxy, asyncio.timeout(90):
        connection = connect(Credentials(proxy.url, credentials.tls))
        one, two, three = (
            LeaderElector(client, namespace, "op", name, lost.append, timing=QUICK)
            for client, name in ((api, "one"), (HttpApi(connection, write_seconds=1), "two"), (api, "three"))
        )
        first = asyncio.create_task(one.run())
        await one.leading.wait()
        second = asyncio.create_task(two.run())
        await asyncio.sleep(5)  # longer than a lease
        assert one.is_leading() and not two.leading.is_set()
        record = (await api.get(LEASES, namespace, "op"))["spec"]
        assert record["holderIdentity"] == "one" and record["renewTime"] > record["acquireTime"]

        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await two.leading.wait()
        record = (await api.get(LEASES, namespace, "op"))["spec"]
        assert record["holderIdentity"] == "two" and record["leaseTransitions"] == 1 and not lost

        third = asyncio.create_task(three.run())
        proxy.freeze()
        await three.leading.wait()
        await second
        assert len(lost) == 1 and "not renewed for 3 s" in lost[0] and not two.is_leading()
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)
        await connection.close()


# ---- events -----------------------------------------------------------------------------------------


async def test_events_are_seen_by_kubectl_with_their_series(
    control_plane: ControlPlane, api: HttpApi, namespace: str
) -> None:
    owner = await api.create(LEASES, namespace, a_lease("about"))
    recorder = Recorder(api, f"{socket.gethostname()}_{os.getpid()}")
    task = asyncio.create_task(recorder.run())
    regarding = Regarding.of({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", **owner})
    try:
        for _ in range(3):
            recorder.event(regarding, "Restarting", "rank 1 failed", warning=True, action="Restart")
            assert await recorder.flush(SECONDS)
        for note in ("ä" * MAX_NOTE, ""):
            recorder.event(regarding, "Started", note)
        # said twice before it was posted at all
        for _ in range(2):
            recorder.event(regarding, "Recovered", "twice")
        assert await recorder.flush(SECONDS)
        assert recorder.counts["failed"] == 0, recorder.counts
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    found = {e["reason"]: e for e in (await api.list(EVENTS, namespace))["items"]}
    assert found["Restarting"]["series"]["count"] == 3 and found["Recovered"]["series"]["count"] == 2
    table = control_plane.kubectl("get", "events", "-n", namespace).splitlines()
    lines = [line for line in table if "Restarting" in line]
    assert len(lines) == 1 and "Warning" in lines[0] and "lease/about" in lines[0] and "rank 1" in lines[0]
    described = control_plane.kubectl("events", "-n", namespace, "--for", "lease/about")
    assert "(x3 over" in described
