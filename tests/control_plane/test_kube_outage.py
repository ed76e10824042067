"""The reflector against a real API server that is cut off, killed and started again.

It has a control plane of its own, since others' connections would be cut too.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devcluster.cluster import ControlPlane
from tests.fakes.api_contract import a_lease
from tests.fakes.tcp_proxy import proxied
from trainyard_operator.kube.api import LEASES, ApiError, Object
from trainyard_operator.kube.client import HttpApi
from trainyard_operator.kube.credentials import Credentials, load
from trainyard_operator.kube.reflector import Reflector
from trainyard_operator.kube.session import connect
from trainyard_operator.kube.store import Key, Store

SECONDS = 60.0


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path) as made:
        yield made


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(SECONDS):
            while not condition():  # noqa: ASYNC110 - many things are waited for, not one event
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"not within {SECONDS:.0f} s: {what}")


def restart(plane: ControlPlane) -> None:
    """Kills the API server and starts it with the same arguments."""
    process = plane.process("kube-apiserver")
    assert process.pid is not None
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
    process.stop(how=signal.SIGKILL)
    process.start(command, env={"TRAINYARD_STANDALONE": "1"}, dies_with_parent=True)


async def answering(api: HttpApi) -> None:
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                await api.list(LEASES, "default")
            except ApiError:
                await asyncio.sleep(0.1)
            else:
                return


async def test_a_reflector_survives_cuts_and_restarts_and_learns_what_it_missed(plane: ControlPlane) -> None:
    credentials = load(plane.kubeconfig)
    direct = connect(credentials)
    api, store, gone = HttpApi(direct), Store(), list[str]()

    def heard(key: Key, old: Object | None, new: Object | None) -> None:
        if new is None:
            gone.append(key[1])

    def names() -> set[str]:
        return {o["metadata"]["name"] for o in store}

    async with proxied(credentials.server) as proxy:
        connection = connect(Credentials(proxy.url, credentials.tls))
        reflector = Reflector(
            HttpApi(connection, read_seconds=5, inactivity_seconds=3), LEASES, "default", "", store, heard
        )
        task = asyncio.create_task(reflector.run())
        try:
            await until(reflector.synced.is_set, "the first list")
            for name in ("a", "b"):
                await api.create(LEASES, "default", a_lease(name))
            await until(lambda: names() == {"a", "b"}, "both are seen")

            proxy.cut()
            await api.create(LEASES, "default", a_lease("c"))
            await until(lambda: "c" in names(), "the watch goes on after a reset")
            assert reflector.restarts["error-0"] >= 1 and reflector.restarts["expired"] == 0

            proxy.freeze()
            await until(lambda: reflector.restarts["inactive"] > 0, "silence is noticed")
            proxy.thaw()
            await api.delete(LEASES, "default", "a")
            await until(lambda: "a" not in names(), "the watch goes on after silence")

            # Away while things are deleted and the server forgets its history: only a list can tell.
            proxy.refusing = True
            proxy.cut()
            await api.delete(LEASES, "default", "b")
            await api.create(LEASES, "default", a_lease("d"))
            restart(plane)
            await answering(api)
            proxy.refusing = False
            await until(lambda: names() == {"c", "d"}, "what was missed is known")
            assert gone == ["a", "b"], gone
            assert not task.done() and reflector.restarts["exception"] == 0, reflector.restarts
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await connection.close()
            await direct.close()
