"""The beat endpoint over real HTTPS on loopback: every status code of the protocol, and 300 agents."""

from __future__ import annotations

import asyncio
import json
import resource
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import pytest

from tests.fakes.api import FakeApi
from tests.fakes.clock import FakeClock, settle
from tests.unit.coordinator_tools import certificate, jwt, review
from trainyard_api.contract import CONTRACT
from trainyard_api.protocol import MAX_BODY, Action, AgentPhase, Beat, Directive, Progress
from trainyard_operator.coordinator.registry import Registry
from trainyard_operator.coordinator.server import UNKNOWN_POD_SECONDS, Coordinator, CoordinatorServer
from trainyard_operator.coordinator.tls import ServerTls
from trainyard_operator.coordinator.tokens import TokenReviewer
from trainyard_operator.kube.api import TOKEN_REVIEWS, ApiError

RUN = "11111111-2222-3333-4444-555555555555"
HOLD = Directive(action=Action.HOLD, attempt=1, reason="forming")
GO = Directive(
    action=Action.RUN, attempt=1, nodes=1, procs_per_node=2, master_addr="10.0.0.1", master_port=29501
)


@dataclass
class FakeFleet:
    up: bool = True
    runs: set[str] = field(default_factory=lambda: {RUN})
    pods: dict[str, str] = field(default_factory=lambda: {"p1": RUN})

    def serving(self) -> bool:
        return self.up

    def run_exists(self, run_uid: str) -> bool:
        return run_uid in self.runs

    def owner_of(self, pod_uid: str) -> str | None:
        return self.pods.get(pod_uid)


class Server:
    """The coordinator as it is deployed, but for the API server behind it."""

    def __init__(self, folder: Path) -> None:
        self.api = FakeApi()
        self.api.reactors[TOKEN_REVIEWS] = review
        self.clock = FakeClock()
        self.fleet = FakeFleet()
        self.rings: list[str] = []
        self.answers: list[int] = []
        self.registry = Registry(on_change=self.rings.append, clock=self.clock)
        self.cert, self.key = certificate(folder)
        self.tls = ServerTls(self.cert, self.key)
        coordinator = Coordinator(
            registry=self.registry,
            tokens=TokenReviewer(self.api, clock=self.clock),
            fleet=self.fleet,
            clock=self.clock,
            on_answer=self.answers.append,
        )
        self.server = CoordinatorServer(coordinator, self.registry, self.tls.context)
        self.port = 0

    async def post(
        self,
        beat: Beat | bytes,
        *,
        run: str = RUN,
        token: str | None = None,
        session: aiohttp.ClientSession | None = None,
    ) -> tuple[int, dict[str, object]]:
        pod = beat.pod_uid if isinstance(beat, Beat) else "p1"
        header = f"Bearer {jwt(pod)}" if token is None else token
        data = json.dumps(beat.to_json()).encode() if isinstance(beat, Beat) else beat
        async with AsyncExitStack() as stack:
            if session is None:
                session = await stack.enter_async_context(self.session())
            async with session.post(
                f"https://localhost:{self.port}/v1/runs/{run}/beat",
                data=data,
                headers={"Authorization": header} if header else {},
            ) as answer:
                return answer.status, await answer.json()

    def session(self) -> aiohttp.ClientSession:
        trust = ssl.create_default_context(cafile=str(self.cert))
        connector = aiohttp.TCPConnector(ssl=trust, limit=0)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(tmp_path)
    made.port = await made.server.start("127.0.0.1", 0)
    yield made
    await made.server.stop()


def beat(pod: str = "p1", **changes: object) -> Beat:
    base = Beat(pod_name=f"name-{pod}", pod_uid=pod, incarnation="one", node_index=0)
    return replace(base, **changes)  # type: ignore[arg-type]


async def until(check: Callable[[], object], seconds: float = 10) -> None:
    """Waits for what happens in the server's own tasks."""
    async with asyncio.timeout(seconds):
        while not check():  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.01)


async def test_a_beat_is_heard_and_answered_with_the_directive(server: Server) -> None:
    server.registry.publish(RUN, {"p1": GO})
    status, answer = await server.post(beat(ready=True, pod_ip="10.0.0.1"))
    assert status == 200
    assert Directive.from_json(answer) == GO and answer["revision"] == GO.revision
    assert server.registry.members(RUN)["p1"].beat == beat(ready=True, pod_ip="10.0.0.1")
    assert server.rings == [RUN] and server.answers == [200]


async def test_a_poll_is_held_until_the_directive_changes(server: Server) -> None:
    server.registry.publish(RUN, {"p1": HOLD})
    held = asyncio.create_task(server.post(beat(seen=HOLD.revision, wait=60)))
    await until(lambda: "p1" in server.registry.members(RUN))
    await settle()
    assert not held.done()
    server.registry.publish(RUN, {"p1": GO})
    status, answer = await held
    assert (status, answer["action"]) == (200, "run")


async def test_an_unchanged_directive_is_answered_after_the_wait(server: Server) -> None:
    server.registry.publish(RUN, {"p1": HOLD})
    status, answer = await server.post(beat(seen=HOLD.revision, wait=0.05))
    assert (status, answer["revision"]) == (200, HOLD.revision)


async def test_an_undecided_run_is_503_and_the_beat_counts_all_the_same(server: Server) -> None:
    status, _ = await server.post(beat(wait=0.01))
    assert status == 503
    assert "p1" in server.registry.members(RUN) and server.rings == [RUN]


async def test_one_that_is_not_the_leader_knows_nothing(server: Server) -> None:
    server.fleet.up = False
    server.fleet.runs = set()
    assert (await server.post(beat()))[0] == 503
    assert server.registry.members(RUN) == {} and server.api.calls == []


@pytest.mark.parametrize("header", ["", "Basic YTpi", "Bearer ", "Bearer nonsense"])
async def test_no_good_token_is_401(server: Server, header: str) -> None:
    assert (await server.post(beat(), token=header))[0] == 401
    assert server.registry.members(RUN) == {}


async def test_a_token_that_the_api_server_refuses_is_401(server: Server) -> None:
    status, answer = await server.post(beat(), token=f"Bearer {jwt('p1', bad=True)}")
    assert status == 401 and "ey" not in str(answer["error"])


async def test_a_token_that_cannot_be_checked_is_503(server: Server) -> None:
    server.api.fail_next("create", ApiError(0, "Timeout", "away"))
    assert (await server.post(beat()))[0] == 503


async def test_another_pods_token_is_403(server: Server) -> None:
    server.fleet.pods["p2"] = RUN
    assert (await server.post(beat("p1"), token=f"Bearer {jwt('p2')}"))[0] == 403
    assert (await server.post(beat("p1", pod_name="name-p2")))[0] == 403
    assert server.registry.members(RUN) == {}


async def test_a_pod_of_another_run_or_of_none_is_403(server: Server) -> None:
    server.fleet.runs.add("other")
    assert (await server.post(beat(), run="other"))[0] == 403
    server.fleet.pods["p1"] = ""
    assert (await server.post(beat()))[0] == 403


async def test_an_old_agent_of_the_pod_is_403(server: Server) -> None:
    server.registry.publish(RUN, {"p1": HOLD})
    assert (await server.post(beat(incarnation="one")))[0] == 200
    assert (await server.post(beat(incarnation="two")))[0] == 200
    assert (await server.post(beat(incarnation="one")))[0] == 403


async def test_a_run_that_is_gone_is_410_also_for_who_waits(server: Server) -> None:
    waiting = asyncio.create_task(server.post(beat(wait=60)))
    await until(lambda: "p1" in server.registry.members(RUN))
    server.fleet.runs.clear()
    server.registry.forget(RUN)
    assert (await waiting)[0] == 410
    assert (await server.post(beat()))[0] == 410


async def test_a_pod_is_gone_only_when_it_stays_unknown(server: Server) -> None:
    server.fleet.pods.clear()
    assert (await server.post(beat()))[0] == 503
    server.clock.now += UNKNOWN_POD_SECONDS + 1
    assert (await server.post(beat()))[0] == 410


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", "not a beat"),
        (b"[]", "Beat"),
        (b"{}", "Beat.podName"),
        (json.dumps({**beat().to_json(), "attempt": "1"}).encode(), "Beat.attempt"),
        (json.dumps({**beat().to_json(), "phase": "dancing"}).encode(), "Beat.phase"),
        (json.dumps({**beat().to_json(), "progress": {"step": 10**20}}).encode(), "too large"),
        (b"[" * 60_000, "not a beat"),
    ],
)
async def test_what_is_no_beat_is_400_and_names_the_field(server: Server, body: bytes, field: str) -> None:
    status, answer = await server.post(body)
    assert status == 400 and field in str(answer["error"])


async def test_a_newer_contract_is_426(server: Server) -> None:
    assert (await server.post(beat(contract=CONTRACT + 1)))[0] == 426


async def test_a_large_body_is_413_announced_or_not(server: Server) -> None:
    big = b" " * (MAX_BODY + 1)
    assert (await server.post(big))[0] == 413

    async def drip() -> AsyncIterator[bytes]:
        yield big

    async with (
        server.session() as session,
        session.post(
            f"https://localhost:{server.port}/v1/runs/{RUN}/beat",
            data=drip(),
            headers={"Authorization": f"Bearer {jwt('p1')}"},
        ) as answer,
    ):
        assert answer.status == 413


async def test_a_loss_of_nan_is_not_said_rather_than_refused(server: Server) -> None:
    server.registry.publish(RUN, {"p1": HOLD})
    body = beat(progress=Progress(step=5, loss=1.5)).to_json()
    for loss in (float("nan"), float("inf")):
        body["progress"]["loss"] = loss
        assert (await server.post(json.dumps(body).encode()))[0] == 200
        assert server.registry.members(RUN)["p1"].beat.progress == Progress(step=5)
    raw = json.dumps(body).encode().replace(b"Infinity", b"1e999")
    assert (await server.post(raw))[0] == 200
    assert server.registry.members(RUN)["p1"].beat.progress == Progress(step=5)


async def test_other_paths_and_methods_are_not_served(server: Server) -> None:
    async with server.session() as session:
        for method, path, expected in (("GET", f"/v1/runs/{RUN}/beat", 405), ("POST", "/metrics", 404)):
            async with session.request(method, f"https://localhost:{server.port}{path}") as answer:
                assert answer.status == expected


async def test_an_agent_that_hangs_up_leaves_no_waiter(server: Server) -> None:
    server.registry.publish(RUN, {"p1": HOLD})
    async with server.session() as session:
        task = asyncio.create_task(server.post(beat(seen=HOLD.revision, wait=2), session=session))
        await until(lambda: "p1" in server.registry.members(RUN))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    agent = server.registry._runs[RUN].agents["p1"]
    await until(lambda: not agent.waiters, seconds=1.5)


async def test_stopping_answers_who_waits(server: Server) -> None:
    server.registry.publish(RUN, {"p1": HOLD})
    held = asyncio.create_task(server.post(beat(seen=HOLD.revision, wait=60)))
    await until(lambda: "p1" in server.registry.members(RUN))
    await server.server.stop()
    assert (await asyncio.wait_for(held, 10))[0] == 200


async def test_three_hundred_agents_hear_of_a_change(server: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 1024, f"this test opens 600 sockets; the limit of open files is {hard}"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1024), hard))
    agents = [f"p{n}" for n in range(300)]
    server.fleet.pods = dict.fromkeys(agents, RUN)
    server.registry.publish(RUN, dict.fromkeys(agents, HOLD))
    try:
        async with server.session() as session:
            for phase, seen, directive in (
                (AgentPhase.IDLE, "", HOLD),  # registers, and opens all the connections
                (AgentPhase.IDLE, HOLD.revision, GO),
                (AgentPhase.RUNNING, GO.revision, HOLD),
            ):
                beats = [beat(a, phase=phase, seen=seen, wait=2.0) for a in agents]
                polls = [asyncio.create_task(server.post(b, session=session)) for b in beats]
                if directive is not HOLD or seen:
                    async with asyncio.timeout(30):
                        while not all(server.registry._runs[RUN].agents[a].waiters for a in agents):
                            # An agent may have been answered after its 2 s before the last one had arrived.
                            polls = [
                                asyncio.create_task(server.post(b, session=session)) if p.done() else p
                                for b, p in zip(beats, polls, strict=True)
                            ]
                            await asyncio.sleep(0.02)
                    server.registry.publish(RUN, dict.fromkeys(agents, directive))
                answers = await asyncio.gather(*polls)
                assert {(s, a["revision"]) for s, a in answers} == {(200, directive.revision)}
        assert len(server.api.calls) == len(agents), "one TokenReview for each agent, and nothing else"
        assert len(server.rings) <= 2 * len(agents), "the first beat and the new phase; polls do not ring"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- certificates -----------------------------------------------------------------------------------


async def test_a_replaced_certificate_is_served_without_a_restart(server: Server, tmp_path: Path) -> None:
    assert server.tls.reload() is False
    cert, key = certificate(tmp_path, "renewed")
    server.key.write_bytes(key.read_bytes())
    assert server.tls.reload() is False, "the new key does not fit the old certificate"
    server.registry.publish(RUN, {"p1": HOLD})
    assert (await server.post(beat()))[0] == 200, "so the old pair is still served"
    server.cert.write_bytes(cert.read_bytes())
    assert server.tls.reload() is True
    served = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", server.port))
    assert served.strip() == cert.read_text().strip()


async def test_old_tls_is_refused(server: Server) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", server.port, ssl=old)


def test_a_key_that_does_not_fit_stops_the_start(tmp_path: Path) -> None:
    cert, _ = certificate(tmp_path, "a")
    _, key = certificate(tmp_path, "b")
    with pytest.raises(ssl.SSLError):
        ServerTls(cert, key)
    with pytest.raises(OSError):
        ServerTls(tmp_path / "missing", key)
