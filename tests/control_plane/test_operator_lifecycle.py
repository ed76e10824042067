"""The real operator process against the real API server: from apply to Complete, through failures and restarts."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from devcluster.cluster import ControlPlane
from tests.control_plane.manifests import training_run
from tests.control_plane.operator_tools import Agent, Cluster, Operator, Process, living, until
from tests.control_plane.server import Server
from trainyard_api.protocol import Action, AgentPhase, Progress


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


class Stage:
    """A run of two nodes with its agents, and the operator that they call now."""

    def __init__(self, cluster: Cluster, operator: Operator, process: Process) -> None:
        self.cluster = cluster
        self.operator = operator
        self.process: Process | None = process
        self.agents: list[Agent] = []

    async def gang(self, name: str = "digits", **spec: object) -> list[Agent]:
        """Applies a run, starts its pods, and makes (silent) agents for them."""
        changes = {f"spec.{key}": value for key, value in spec.items()}
        run = self.cluster.apply(training_run(changes, name=name))
        size = run["spec"]["nodes"]["min"]

        def mine() -> list[dict[str, object]]:
            return [p for p in self.cluster.pods() if p["metadata"]["labels"]["trainyard.dev/run"] == name]

        await until(f"{size} pods of {name}", lambda: len(mine()) == size)
        self.cluster.start_pods()
        self.agents = [Agent(self.cluster, run, pod, lambda: self.process) for pod in mine()]
        return self.agents

    async def training(self, attempt: int, name: str = "digits") -> None:
        await until(f"all agents to run attempt {attempt}", lambda: all(a.runs(attempt) for a in self.agents))
        await until("phase Running", lambda: self.cluster.status(name).get("phase") == "Running")

    async def restart(self, number: signal.Signals) -> None:
        """Ends the operator, and starts another one."""
        assert self.process is not None
        await self.process.end(number)
        self.process = None
        self.process = await self.operator.ready()


@pytest.fixture
async def stage(cluster: Cluster, operator: Operator) -> Stage:
    return Stage(cluster, operator, await operator.ready())


async def test_from_apply_through_a_failure_to_complete(stage: Stage) -> None:
    cluster = stage.cluster
    async with living(await stage.gang()) as agents:
        first, second = agents
        await stage.training(1)
        assert [d.action for d in first.heard][-1] is Action.RUN
        told = [a.told for a in agents]
        assert [d.node_rank for d in told if d] == [0, 1]
        assert {(d.master_addr, d.nodes, d.attempt) for d in told if d} == {(first.beat.pod_ip, 2, 1)}
        pods = {p["metadata"]["name"]: p["metadata"]["uid"] for p in cluster.pods()}

        first.commit(7)
        await until("the checkpoint in the status", lambda: cluster.status("digits").get("checkpoint"))
        second.fail("loss is nan")
        await stage.training(2)
        for agent in agents:
            assert agent.told is not None and (agent.told.action, agent.told.attempt) == (Action.RUN, 2)
            for directive, persisted in zip(agent.heard, agent.persisted, strict=True):
                assert directive.attempt <= persisted, "an attempt is persisted before anything of it exists"
        assert pods == {p["metadata"]["name"]: p["metadata"]["uid"] for p in cluster.pods()}, "pods were kept"
        status = cluster.status("digits")
        assert status["attempt"] == 2 and status["restarts"]["user"] == 1
        assert status["rootCause"]["rank"] == 1 and "loss is nan" in status["rootCause"]["message"]

        for agent in agents:
            agent.succeed()
        await until("Complete", lambda: cluster.is_true("digits", "Complete"))
        await until(
            "agents to be told to exit", lambda: all(a.told and a.told.action is Action.EXIT for a in agents)
        )
        assert {a.told.exit_code for a in agents if a.told} == {0}
    assert stage.process is not None
    metrics = stage.process.web("/metrics")[1]
    assert 'trainyard_restarts_total{class="user",reason="WorkerFailed"} 1.0' in metrics
    assert 'trainyard_runs{phase="Complete"} 1.0' in metrics
    assert 'trainyard_token_reviews_total{result="accepted"} 2.0' in metrics
    events = cluster.server.request("GET", f"/apis/events.k8s.io/v1/namespaces/{cluster.namespace}/events")
    assert {"WorkerFailed", "Succeeded"} <= {e["reason"] for e in events.body["items"]}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
async def test_a_restarted_operator_says_the_same_and_writes_nothing(
    stage: Stage, number: signal.Signals
) -> None:
    async with living(await stage.gang()) as agents:
        await stage.training(1)
        agents[0].fail()
        await stage.training(2)
        await asyncio.sleep(0.5)
        before = [a.told for a in agents]
        began = time.time()
        await stage.restart(number)
        # Asked afresh, as by an agent that has obeyed nothing yet, it derives what the one before had said.
        for agent, directive in zip(agents, before, strict=True):
            assert directive is not None
            deadline = time.monotonic() + 20
            while True:
                status, answer = await agent.post(replace(agent.beat, seen="", wait=1.0))
                if status == 200:
                    break
                assert status in (0, 503) and time.monotonic() < deadline, (status, answer)
            assert answer["revision"] == directive.revision
        await asyncio.sleep(3)
        assert stage.cluster.operator_writes(began) == []
        assert [a.told for a in agents] == before, "nobody was told anything else"
        agents[0].fail("and it goes on from there")
        await stage.training(3)


async def test_a_failure_while_the_operator_is_away_is_handled_when_it_is_back(stage: Stage) -> None:
    async with living(await stage.gang()) as agents:
        await stage.training(1)
        assert stage.process is not None
        await stage.process.end(signal.SIGKILL)
        stage.process = None
        agents[1].fail()
        await asyncio.sleep(0.3)
        stage.process = await stage.operator.ready()
        await stage.training(2)
    assert stage.cluster.status("digits")["rootCause"]["rank"] == 1


async def test_a_run_that_trains_costs_no_writes(stage: Stage) -> None:
    async with living(await stage.gang()) as agents:
        await stage.training(1)
        await asyncio.sleep(2)  # what the last transition still had to say
        began = time.time()
        await asyncio.sleep(15)
        writes = stage.cluster.operator_writes(began)
        assert writes == [], "beats without news are not worth a write"
        for step in range(2, 60):
            agents[0].say(progress=Progress(step=step, total_steps=100, time=time.time()))
            await asyncio.sleep(0.05)
        await until("progress in the status", lambda: stage.cluster.status("digits").get("step", 0) > 50)
        writes = stage.cluster.operator_writes(began)
        assert len(writes) <= 4 and set(writes) <= {"patch trainingruns/digits"}, writes


async def test_a_lost_pod_is_replaced_and_the_others_are_kept(stage: Stage) -> None:
    cluster = stage.cluster
    async with living(await stage.gang()) as agents:
        await stage.training(1)
        kept, lost = agents
        path = f"{cluster.pods_path}/{lost.name}"
        assert cluster.server.request("DELETE", path).code == 200
        await until(
            "a pod of attempt 2", lambda: any(p["metadata"]["name"].endswith("-2") for p in cluster.pods())
        )
        pods = cluster.start_pods()
        assert [p["metadata"]["uid"] for p in pods if p["metadata"]["name"] == kept.name] == [
            kept.beat.pod_uid
        ]
        (new,) = [p for p in pods if p["metadata"]["name"].endswith("-2")]
        replacement = Agent(cluster, cluster.run("digits"), new, lambda: stage.process)
        async with living([replacement]):
            stage.agents = [kept, replacement]
            await stage.training(2)
        assert cluster.status("digits")["restarts"]["infrastructure"] == 1
        assert (await lost.post())[0] in (401, 503, 410), "the pod and so its token are gone"


async def test_suspend_and_resume(stage: Stage) -> None:
    cluster = stage.cluster
    async with living(await stage.gang()) as agents:
        await stage.training(1)
        cluster.patch(f"{cluster.runs_path}/digits", {"spec": {"suspend": True}})
        await until(
            "agents to be told to exit", lambda: all(a.told and a.told.action is Action.EXIT for a in agents)
        )
        await until("pods to be gone", lambda: not cluster.pods())
        await until("Suspended", lambda: cluster.is_true("digits", "Suspended"))
    cluster.patch(f"{cluster.runs_path}/digits", {"spec": {"suspend": False}})
    await until("two new pods", lambda: len(cluster.pods()) == 2)
    assert cluster.status("digits")["attempt"] == 2


async def test_deleting_a_run_ends_its_agents(stage: Stage) -> None:
    cluster = stage.cluster
    async with living(await stage.gang()) as agents:
        await stage.training(1)
        assert cluster.server.request("DELETE", f"{cluster.runs_path}/digits").code == 200
        await until("pods to be collected", lambda: not cluster.pods())
        await until(
            "agents to be refused or told to exit",
            lambda: all(410 in a.statuses or (a.told and a.told.action is Action.EXIT) for a in agents),
        )


async def test_strangers_are_refused(stage: Stage) -> None:
    cluster = stage.cluster
    first, second = await stage.gang()
    run = cluster.run("digits")
    assert (await first.post())[0] in (200, 503)
    assert (await first.post(token="nonsense"))[0] == 401
    (pod,) = [p for p in cluster.pods() if p["metadata"]["name"] == first.name]
    api_token = cluster.token(pod, audience="https://kubernetes.default.svc")
    assert (await first.post(token=api_token))[0] == 401, "a token for the API server is not for us"
    forged = first.token[:-8] + ("A" * 8 if not first.token.endswith("A" * 8) else "B" * 8)
    assert (await first.post(token=forged))[0] == 401
    assert (await first.post(token=second.token))[0] == 403, "another pod's"
    other = cluster.apply(training_run(name="other"))
    await until("pods of the other run", lambda: len(cluster.pods()) == 4)
    first.run_uid = other["metadata"]["uid"]
    assert (await first.post())[0] == 403, "a pod of another run"
    first.run_uid = "00000000-0000-0000-0000-000000000000"
    assert (await first.post())[0] == 410
    first.run_uid = run["metadata"]["uid"]
    assert (await first.post())[0] in (200, 503)
    assert stage.process is not None
    for token in (first.token, second.token, api_token, forged):
        assert token[-20:] not in stage.process.log and token[:40] not in stage.process.log


async def test_a_poisoned_status_hurts_nobody_else(stage: Stage) -> None:
    cluster = stage.cluster
    cluster.apply(training_run(name="poisoned"))
    await until("the first status", lambda: cluster.status("poisoned").get("attempt"))
    path = f"{cluster.runs_path}/poisoned/status"
    codes = []
    for status in (
        {"attempt": 10**6, "attempts": [{"attempt": 3}]},
        {"phase": "Running", "notBefore": "2026-01-01T00:00:00Z", "bestStep": 2**40},
        {"attempt": 0, "attempts": None, "conditions": None, "phase": None},
    ):
        codes.append(cluster.server.request("PATCH", path, {"status": status}).code)
        await asyncio.sleep(0.3)
    assert 200 in codes, "nothing of it was taken, so nothing was tested"
    async with living(await stage.gang("healthy")):
        await stage.training(1, "healthy")
    assert stage.process is not None and stage.process.alive
    assert stage.process.web("/healthz")[0] == 200
    assert 'result="error"' not in stage.process.web("/metrics")[1]
    assert "Traceback" not in stage.process.log


async def test_a_finished_run_is_left_as_it_is_by_a_new_operator(stage: Stage) -> None:
    async with living(await stage.gang()) as agents:
        await stage.training(1)
        for agent in agents:
            agent.succeed()
        await until("Complete", lambda: stage.cluster.is_true("digits", "Complete"))
    await asyncio.sleep(0.5)
    began = time.time()
    await stage.restart(signal.SIGKILL)
    status, answer = 503, {}
    while status in (0, 503):
        status, answer = await agents[0].post(replace(agents[0].beat, seen="", wait=1.0))
    assert (status, answer["action"], answer.get("exitCode", 0)) == (200, "exit", 0)
    agents[0].beat = replace(agents[0].beat, phase=AgentPhase.FAILED)
    await agents[0].post()
    await asyncio.sleep(2)
    assert stage.cluster.operator_writes(began) == []
    assert stage.cluster.is_true("digits", "Complete")
