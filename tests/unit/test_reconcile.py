"""Rounds on the real store, the real registry and an API server in memory."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from tests.builders import RUN_UID, SETTINGS, a_run
from tests.fakes.api import FakeApi
from tests.fakes.clock import FakeClock
from trainyard_api.protocol import Action, AgentPhase, Beat, Progress
from trainyard_api.v1alpha1 import Status
from trainyard_operator.coordinator.registry import Registry
from trainyard_operator.kube.api import PODS, RUNS, ApiError
from trainyard_operator.kube.recorder import Regarding
from trainyard_operator.kube.store import Store
from trainyard_operator.reconcile import CRASH_SECONDS, Reconciler, Round

KEY = ("team", "demo")


class Events:
    def __init__(self) -> None:
        self.posted: list[tuple[str, str, bool]] = []

    def event(
        self,
        regarding: Regarding,
        reason: str,
        note: str,
        *,
        warning: bool = False,
        action: str = "Reconcile",
    ) -> None:
        assert regarding.uid
        self.posted.append((reason, note, warning))


class Operator:
    """One operator process; `again` is another one after it."""

    def __init__(self, api: FakeApi | None = None, clock: FakeClock | None = None) -> None:
        self.api = api or FakeApi()
        self.clock = clock or FakeClock()
        self.runs, self.pods = Store(), Store()
        self.events = Events()
        self.rounds: list[Round] = []
        self.registry = Registry(on_change=lambda uid: None, clock=self.clock)
        began = self.clock.time()
        self.reconciler = Reconciler(
            api=self.api,
            runs=self.runs,
            pods=self.pods,
            coordinator=self.registry,
            events=self.events,
            settings=SETTINGS,
            clock=self.clock,
            listening_since=lambda: began,
            on_round=self.rounds.append,
        )

    def sync(self) -> None:
        """The watches deliver everything."""
        for resource, store in ((RUNS, self.runs), (PODS, self.pods)):
            store.replace(self.api.all(resource), str(self.api._version))

    async def settle(self) -> float | None:
        """Rounds until one does not ask for another at once."""
        for _ in range(20):
            again = await self.reconciler(KEY)
            if again != 0.0:
                return again
        raise AssertionError("20 rounds, and it still wants another")

    def status(self) -> Status:
        obj = self.api.peek(RUNS, *KEY)
        assert obj is not None
        return Status.from_json(obj.get("status"))

    def beat(self, name: str, phase: AgentPhase = AgentPhase.IDLE, attempt: int = 0, **more: Any) -> None:
        pod = self.api.peek(PODS, "team", name)
        assert pod is not None
        uid, ip = pod["metadata"]["uid"], pod["status"].get("podIP", "")
        index = int(name.split("-")[1])
        self.registry.hear(
            RUN_UID,
            Beat(
                pod_name=name,
                pod_uid=uid,
                incarnation="a",
                node_index=index,
                pod_ip=ip,
                ready=True,
                phase=phase,
                attempt=attempt,
                **more,
            ),
        )

    async def kubelet(self) -> None:
        for pod in self.api.all(PODS):
            if pod["status"]["phase"] == "Pending":
                name = pod["metadata"]["name"]
                status = {"status": {"phase": "Running", "podIP": f"10.0.0.{name.split('-')[1]}"}}
                await self.api.merge_patch(PODS, "team", name, status, subresource="status")
        self.sync()


def created(**spec: Any) -> Operator:
    operator = Operator()
    operator.api.seed(RUNS, a_run().with_spec(**spec).object())
    operator.sync()
    return operator


async def training() -> Operator:
    operator = created()
    await operator.settle()
    await operator.kubelet()
    for name in ("demo-0-1", "demo-1-1"):
        operator.beat(name)
    await operator.settle()
    for name in ("demo-0-1", "demo-1-1"):
        operator.beat(name, AgentPhase.RUNNING, 1, progress=Progress(step=3))
    await operator.settle()
    return operator


async def test_from_a_new_run_to_training() -> None:
    operator = await training()
    status = operator.status()
    assert (status.phase, status.attempt, status.nodes.summary) == ("Running", 1, "2/2")
    uids = [p["metadata"]["uid"] for p in operator.api.all(PODS)]
    answers = [operator.registry.answer(RUN_UID, uid) for uid in uids]
    assert [a.directive.action for a in answers if a] == [Action.RUN, Action.RUN]
    assert {r.outcome for r in operator.rounds} == {"done"}


async def test_without_news_nothing_is_called_whether_the_watch_is_behind_or_not() -> None:
    operator = await training()
    operator.api.calls.clear()
    again = await operator.settle()
    operator.sync()
    again = await operator.settle()
    assert operator.api.calls == [] and again is not None and 0 < again <= SETTINGS.agent_ttl


async def test_a_restarted_operator_calls_nothing() -> None:
    before = await training()
    after = Operator(before.api, before.clock)
    after.sync()
    after.api.calls.clear()
    await after.settle()
    assert after.api.calls == [] and after.events.posted == []
    answer = after.registry.answer(RUN_UID, before.api.all(PODS)[0]["metadata"]["uid"])
    assert answer is not None and answer.directive.action == Action.RUN


async def test_a_conflict_is_cured_by_reading_the_run_again() -> None:
    operator = created()
    await operator.api.merge_patch(RUNS, "team", "demo", {"metadata": {"labels": {"team": "a"}}})
    operator.api.calls.clear()
    assert await operator.reconciler(KEY) == 0.0
    assert operator.rounds[-1].outcome == "conflict" and operator.api.verbs() == ["patch", "get"]
    await operator.settle()
    assert operator.status().attempt == 1 and len(operator.api.all(PODS)) == 2


async def test_a_run_that_vanished_is_not_chased() -> None:
    operator = created()
    operator.api.objects[RUNS].clear()
    again = await operator.reconciler(KEY)
    assert again is not None and again > 0
    operator.sync()
    assert await operator.reconciler(KEY) is None
    assert operator.rounds[-1].outcome == "gone"


async def test_a_run_that_is_gone_is_forgotten_by_the_coordinator() -> None:
    operator = await training()
    assert operator.registry.members(RUN_UID)
    operator.runs.remove(operator.api.peek(RUNS, *KEY))
    await operator.reconciler(KEY)
    assert not operator.registry.members(RUN_UID)


async def test_a_new_run_of_the_same_name_starts_with_nothing() -> None:
    operator = await training()
    operator.api.objects[RUNS].clear()
    operator.api.seed(
        RUNS, {**a_run().object(), "metadata": {**a_run().object()["metadata"], "uid": "second"}}
    )
    operator.sync()
    await operator.settle()
    assert not operator.registry.members(RUN_UID)
    # The first run's pods still hold the names: that is said, and they are not touched.
    running = operator.status().condition("Running")
    assert running is not None and running.reason == "CreateFailed"
    assert len(operator.api.all(PODS)) == 2


async def test_a_refusal_is_in_the_status_at_once_and_is_tried_again_with_back_off() -> None:
    operator = created()
    error = ApiError(403, "Forbidden", "exceeded quota: gpus")
    operator.api.fail_next("create", error, times=6)
    again = await operator.settle()
    running = operator.status().condition("Running")
    assert running is not None and running.reason == "CreateFailed" and "exceeded quota" in running.message
    assert operator.clock.now == operator.rounds[0].observed.now  # no time had to pass
    pauses = []
    while operator.api.verbs(PODS).count("create") < 8:
        assert again is not None and again > 0
        pauses.append(round(again, 3))
        operator.clock.now += again
        again = await operator.settle()
    assert pauses == [1.0, 2.0, 4.0]
    operator.sync()
    await operator.settle()
    running = operator.status().condition("Running")
    assert running is not None and running.reason == "PodsPending"
    assert [reason for reason, _, warning in operator.events.posted if warning] == ["CreateFailed"]


async def test_api_errors_go_to_the_queue() -> None:
    operator = created()
    operator.api.fail_next("patch", ApiError(503, "Unavailable", "later"))
    with pytest.raises(ApiError):
        await operator.reconciler(KEY)
    assert operator.rounds[-1].outcome == "api_error"
    await operator.settle()
    assert operator.status().attempt == 1


async def test_a_run_that_cannot_be_read_is_complained_of_once(caplog: pytest.LogCaptureFixture) -> None:
    operator = Operator()
    operator.api.seed(RUNS, a_run().with_spec(nodes={"min": "many"}).object())
    operator.sync()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await operator.reconciler(KEY) is None
    assert [r.getMessage() for r in caplog.records if "spec.nodes.min" in r.getMessage()] != []
    assert len(operator.events.posted) == 1 and "spec.nodes.min" in operator.events.posted[0][1]
    assert operator.api.verbs() == [] and operator.rounds[-1].outcome == "invalid"


async def test_a_bug_is_logged_with_its_run_and_kills_nobody(caplog: pytest.LogCaptureFixture) -> None:
    operator = created()

    class Broken(Registry):
        def members(self, run_uid: str) -> Any:
            raise RuntimeError("a bug")

    operator.reconciler._coordinator = Broken(on_change=lambda uid: None, clock=operator.clock)
    assert await operator.reconciler(KEY) == CRASH_SECONDS
    assert "team/demo" in caplog.text and "a bug" in caplog.text
    assert operator.rounds[-1].outcome == "crash"


async def test_progress_is_written_once_an_interval() -> None:
    operator = await training()
    operator.api.calls.clear()
    for step in range(4, 34):
        operator.clock.now += 1
        for name in ("demo-0-1", "demo-1-1"):
            operator.beat(name, AgentPhase.RUNNING, 1, progress=Progress(step=step))
        await operator.settle()
    assert operator.api.verbs() == ["patch"] * 3
    assert operator.status().step == 33


async def test_the_written_status_is_json_and_small() -> None:
    operator = await training()
    obj = operator.api.peek(RUNS, *KEY)
    assert obj is not None and len(json.dumps(obj["status"], allow_nan=False)) < 8192


# ---- deletionPolicy Delete --------------------------------------------------------------------------

DELETES = {"uri": "s3://bucket/demo", "deletionPolicy": "Delete"}


async def deleted() -> Operator:
    """The run is deleted, and its pods have ended."""
    operator = created(checkpoint=DELETES)
    await operator.settle()
    await operator.kubelet()
    await operator.api.delete(RUNS, "team", "demo")
    operator.sync()
    await operator.settle()
    for pod in operator.api.all(PODS):
        await operator.api.delete(PODS, "team", pod["metadata"]["name"], grace_seconds=0)
    operator.sync()
    return operator


async def test_a_run_goes_with_its_checkpoints() -> None:
    operator = await deleted()
    await operator.settle()
    (pod,) = operator.api.all(PODS)
    assert pod["metadata"]["name"] == "demo-cleanup-1"
    state = {"terminated": {"exitCode": 0, "message": '{"outcome": "deleted", "message": "all of it"}'}}
    status = {"phase": "Succeeded", "containerStatuses": [{"name": "cleanup", "state": state}]}
    await operator.api.merge_patch(PODS, "team", "demo-cleanup-1", {"status": status}, subresource="status")
    operator.sync()
    await operator.settle()
    assert operator.api.peek(RUNS, *KEY) is None
    assert [r for r, _, _ in operator.events.posted][-1] == "CheckpointsDeleted"


async def test_a_run_goes_with_its_namespace(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing can be created there any more, no pod and no Event: the log says what stays behind."""
    operator = await deleted()
    ends = ApiError(403, "Forbidden", "because it is being terminated", causes=("NamespaceTerminating",))
    operator.api.fail_next("create", ends, times=10)
    with caplog.at_level(logging.WARNING):
        await operator.settle()
    assert operator.api.peek(RUNS, *KEY) is None
    assert "stay behind" in caplog.text and f"s3://bucket/demo/{RUN_UID}/" in caplog.text


async def test_a_cleanup_pod_that_is_refused_is_tried_again_later() -> None:
    operator = await deleted()
    operator.api.fail_next("create", ApiError(403, "Forbidden", "exceeded quota"))
    pause = await operator.settle()
    assert not operator.api.all(PODS) and pause is not None
    await operator.clock.advance(pause)
    operator.sync()
    await operator.settle()
    assert [p["metadata"]["name"] for p in operator.api.all(PODS)] == ["demo-cleanup-1"]
