"""Fluent builders of what the planner reads, and `Scene`: a run with its cluster, driven by hand.

a_run().with_nodes(2).suspended().build()
a_pod(0).running().build()
a_beat(a_pod(0)).training(attempt=1, step=40).build()
Scene(a_run()).started().stepping(40)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from trainyard_api import contract
from trainyard_api.protocol import AgentPhase, Beat, Checkpoint, Directive, Failure, Progress, Resumed
from trainyard_api.serde import decode
from trainyard_api.v1alpha1 import RestartPolicy, Spec, Status, TrainingRun
from trainyard_operator.plan import Observed, Plan, PlanSettings, plan
from trainyard_operator.plan.model import EventNote, Member, PodView, Refusal
from trainyard_operator.plan.names import parse_pod_name

T0 = 1_800_000_000.0
"""Unix seconds at which every scene begins."""
RUN_UID = "11111111-2222-4333-8444-555555555555"
SETTINGS = PlanSettings(coordinator_url="https://coordinator.test:8443", coordinator_ca="PEM")

Planner = Callable[[Observed, PlanSettings], Plan]


@dataclass(frozen=True)
class RunBuilder:
    """A TrainingRun as JSON, with what every test needs and nothing else."""

    name: str = "demo"
    uid: str = RUN_UID
    spec: dict[str, Any] = field(
        default_factory=lambda: {
            "image": "trainer:1",
            "nodes": {"min": 2},
            "command": ["train.py"],
            "checkpoint": {"uri": "s3://bucket/demo"},
        }
    )
    status: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def with_spec(self, **fields: Any) -> Self:
        """Fields by their JSON names; None removes one."""
        merged = {**self.spec, **fields}
        return replace(self, spec={k: v for k, v in merged.items() if v is not None})

    def with_nodes(self, count: int) -> Self:
        return self.with_spec(nodes={"min": count})

    def suspended(self, suspend: bool = True) -> Self:
        return self.with_spec(suspend=suspend)

    def restarting(self, **policy: Any) -> Self:
        return self.with_spec(restartPolicy={**self.spec.get("restartPolicy", {}), **policy})

    def managed_by(self, manager: str) -> Self:
        return self.with_spec(managedBy=manager)

    def deleting(self) -> Self:
        return replace(self, metadata={**self.metadata, "deletionTimestamp": "2026-01-01T00:00:00Z"})

    def with_finalizers(self, *finalizers: str) -> Self:
        return replace(self, metadata={**self.metadata, "finalizers": list(finalizers)})

    def with_status(self, status: dict[str, Any]) -> Self:
        return replace(self, status=status)

    def object(self) -> dict[str, Any]:
        """As the API server has it."""
        meta = {
            "name": self.name,
            "namespace": "team",
            "uid": self.uid,
            "generation": 1,
            "resourceVersion": "1",
        }
        head = {
            "apiVersion": contract.API_VERSION,
            "kind": contract.KIND,
            "metadata": {**meta, **self.metadata},
        }
        return {**head, "spec": self.spec, **({"status": self.status} if self.status else {})}

    def build(self) -> TrainingRun:
        return TrainingRun.from_object(self.object())


@dataclass(frozen=True)
class PodBuilder:
    """One pod of the run."""

    view: PodView

    def _with(self, **fields: Any) -> Self:
        return replace(self, view=replace(self.view, **fields))

    def running(self, node: str = "") -> Self:
        index = self.view.index
        return self._with(
            phase="Running",
            ip=f"10.0.{self.view.created_in}.{index + 1}",
            node=node or f"node-{index}",
            started_at=T0,
        )

    def pending(self, *, unschedulable: str = "", waiting: str = "", message: str = "") -> Self:
        return self._with(unschedulable=unschedulable, waiting_reason=waiting, waiting_message=message)

    def deleting(self) -> Self:
        return self._with(deleting=True)

    def failed(
        self, *, code: int | None = 1, reason: str = "", terminated: str = "Error", said: str = ""
    ) -> Self:
        return self._with(
            phase="Failed",
            exit_code=code,
            reason=reason,
            terminated_reason=terminated,
            termination_message=said,
        )

    def succeeded(self, said: str = "") -> Self:
        return self._with(
            phase="Succeeded", exit_code=0, terminated_reason="Completed", termination_message=said
        )

    def build(self) -> PodView:
        return self.view


@dataclass(frozen=True)
class BeatBuilder:
    """One beat of a pod's agent."""

    beat: Beat

    def _with(self, **fields: Any) -> Self:
        return replace(self, beat=replace(self.beat, **fields))

    def ready(self, attempt: int = 0) -> Self:
        return self._with(ready=True, phase=AgentPhase.IDLE, attempt=attempt)

    def starting(self, attempt: int) -> Self:
        return self._with(ready=True, phase=AgentPhase.STARTING, attempt=attempt)

    def training(self, attempt: int, step: int, **progress: Any) -> Self:
        return self._with(
            ready=True, phase=AgentPhase.RUNNING, attempt=attempt, progress=Progress(step=step, **progress)
        )

    def resumed(self, attempt: int, step: int, first_step_time: float | None = None, uri: str = "") -> Self:
        return self._with(
            resumed=Resumed(attempt=attempt, step=step, uri=uri, first_step_time=first_step_time)
        )

    def succeeded(self, attempt: int) -> Self:
        return self._with(ready=True, phase=AgentPhase.SUCCEEDED, attempt=attempt)

    def failed(self, attempt: int, *, rank: int | None = 0, code: int | None = 1, **details: Any) -> Self:
        failure = Failure(attempt=attempt, rank=rank, exit_code=code, **details)
        return self._with(ready=True, phase=AgentPhase.FAILED, attempt=attempt, failure=failure)

    def draining(self, attempt: int) -> Self:
        return self._with(phase=AgentPhase.DRAINING, attempt=attempt)

    def committed(self, step: int, seq: int) -> Self:
        return self._with(checkpoint=Checkpoint(step=step, seq=seq, uri=f"s3://bucket/{seq}", time=T0))

    def reborn(self) -> Self:
        return self._with(incarnation=self.beat.incarnation + "+", seen="")

    def build(self) -> Beat:
        return self.beat


def a_run(name: str = "demo") -> RunBuilder:
    return RunBuilder(name=name)


def a_pod(index: int = 0, created_in: int = 1, *, run: str = "demo") -> PodBuilder:
    name = f"{run}-{index}-{created_in}"
    return PodBuilder(
        PodView(
            name=name,
            uid=f"uid-{name}",
            index=index,
            created_in=created_in,
            phase="Pending",
            creation_time=T0,
        )
    )


def a_beat(pod: PodView | PodBuilder) -> BeatBuilder:
    view = pod.view if isinstance(pod, PodBuilder) else pod
    return BeatBuilder(
        Beat(
            pod_name=view.name,
            pod_uid=view.uid,
            incarnation="a",
            node_index=max(view.index, 0),
            pod_ip=view.ip,
        )
    )


class Scene:
    """A run, its pods and its agents, all by hand. `step` is one round of an operator that never fails."""

    def __init__(
        self, run: RunBuilder | None = None, *, planner: Planner = plan, settings: PlanSettings = SETTINGS
    ) -> None:
        self.builder = run or a_run()
        self.settings = settings
        self.status: Status = decode(Status, self.builder.status)
        self.pods: dict[str, PodView] = {}
        self.members: dict[str, Member] = {}
        self.directives: dict[str, Directive] = {}
        self.events: list[EventNote] = []
        self.refusals: tuple[Refusal, ...] = ()
        self.now = T0
        self.listening_since = T0 - 3600
        self.status_written = 0.0
        self.writes = 0
        self.run_deleted = False
        self._planner = planner
        self._uids = 0

    # ---- rounds -------------------------------------------------------------------------------------

    @property
    def run(self) -> TrainingRun:
        return replace(self.builder.build(), status=self.status)

    def observed(self) -> Observed:
        return Observed(
            run=self.run,
            pods=tuple(self.pods.values()),
            members=self.members,
            now=self.now,
            listening_since=self.listening_since,
            refusals=self.refusals,
            status_written=self.status_written,
        )

    def plan(self) -> Plan:
        return self._planner(self.observed(), self.settings)

    def step(self) -> Plan:
        """Plans and applies."""
        decided = self.plan()
        self.apply(decided)
        return decided

    def settle(self, rounds: int = 20) -> Plan:
        """Rounds until one has nothing to do; returns that one. At most `rounds`."""
        for _ in range(rounds):
            decided = self.step()
            if quiet(decided):
                return decided
        raise AssertionError(f"not settled after {rounds} rounds; the last plan was {decided}")

    def apply(self, decided: Plan) -> None:
        if decided.status is not None:
            self.status = Status.from_json(decided.status.to_json())
            self.status_written = self.now
            self.writes += 1
        for doomed in decided.delete_pods:
            self.delete(doomed.name, doomed.uid)
        for wanted in decided.create_pods:
            self.create(wanted.body)
        if decided.directives is not None:
            self.directives = dict(decided.directives)
        if decided.finalizers is not None:
            self.builder = self.builder.with_finalizers(*decided.finalizers)
        self.events += decided.events
        self.run_deleted |= decided.delete_run

    def create(self, body: dict[str, Any]) -> PodView:
        name = body["metadata"]["name"]
        assert name not in self.pods, f"the name {name} is used twice"
        index, attempt = parse_pod_name(name) or (-1, 0)
        self._uids += 1
        self.pods[name] = PodView(
            name=name,
            uid=f"uid-{name}-{self._uids}",
            index=index,
            created_in=attempt,
            phase="Pending",
            creation_time=self.now,
        )
        return self.pods[name]

    def delete(self, name: str, uid: str) -> None:
        pod = self.pods.get(name)
        if pod is not None and pod.uid == uid:
            if pod.phase == "Running":
                self.pods[name] = replace(pod, deleting=True)
            else:
                del self.pods[name]

    # ---- what tests do to it ------------------------------------------------------------------------

    def at(self, index: int) -> PodView:
        """The newest pod of that index."""
        return max((p for p in self.pods.values() if p.index == index), key=lambda p: p.created_in)

    def put(self, pod: PodView | PodBuilder) -> PodView:
        view = pod.view if isinstance(pod, PodBuilder) else pod
        self.pods[view.name] = view
        return view

    def change(self, index: int, **fields: Any) -> PodView:
        return self.put(replace(self.at(index), **fields))

    def drop(self, index: int) -> PodView:
        """The pod is gone for good."""
        return self.pods.pop(self.at(index).name)

    def run_pods(self) -> Self:
        """The kubelets start everything."""
        for pod in list(self.pods.values()):
            if pod.phase == "Pending":
                ip = f"10.0.{pod.created_in}.{pod.index + 1}"
                self.put(
                    replace(
                        pod,
                        phase="Running",
                        ip=ip,
                        node=f"node-{pod.index}",
                        started_at=self.now,
                        waiting_reason="",
                    )
                )
        return self

    def hear(self, beat: BeatBuilder | Beat, *, age: float = 0.0) -> Self:
        said = beat.beat if isinstance(beat, BeatBuilder) else beat
        self.members[said.pod_uid] = Member(beat=said, received=self.now - age)
        return self

    def say(self, index: int) -> BeatBuilder:
        """A beat of that member to start from: its last one, or a first."""
        pod = self.at(index)
        known = self.members.get(pod.uid)
        return BeatBuilder(known.beat) if known else a_beat(pod)

    def all(self, make: Callable[[BeatBuilder], BeatBuilder]) -> Self:
        """Every living member says something."""
        for index in sorted({p.index for p in self.pods.values() if p.phase == "Running" and not p.deleting}):
            self.hear(make(self.say(index)))
        return self

    def again(self) -> Self:
        """Everybody repeats what he said, now."""
        for uid, member in self.members.items():
            self.members[uid] = replace(member, received=self.now)
        return self

    def wait(self, seconds: float) -> Self:
        """Time passes while agents beat."""
        self.now += seconds
        return self.again()

    def silence(self, seconds: float) -> Self:
        """Time passes and nobody is heard."""
        self.now += seconds
        return self

    def restart_operator(self) -> Self:
        """A new process: it remembers nothing."""
        self.members = {}
        self.directives = {}
        self.listening_since = self.now
        self.status_written = 0.0
        return self

    def edit(self, change: Callable[[RunBuilder], RunBuilder]) -> Self:
        self.builder = change(self.builder)
        return self

    # ---- where tests begin --------------------------------------------------------------------------

    def created(self) -> Self:
        """Attempt 1 is persisted and its pods are asked for."""
        self.settle()
        return self

    def started(self) -> Self:
        """All pods run, all agents are warm, the gang was told to run and started."""
        self.created()
        self.run_pods().all(lambda beat: beat.ready())
        self.settle()
        self.all(lambda beat: beat.starting(self.status.attempt))
        self.settle()
        return self

    def stepping(self, step: int, *, resumed: int = 0) -> Self:
        """The current attempt trains and has reached `step`."""
        attempt = self.status.attempt
        self.all(
            lambda beat: beat.training(attempt, step).resumed(attempt, resumed, first_step_time=self.now)
        )
        self.settle()
        return self

    def regroup(self) -> Self:
        """After a failure: the back-off passes, what is missing comes up, and the next attempt starts."""
        self.settle()
        self.wait(61)
        self.run_pods()
        for name in [n for n, p in self.pods.items() if p.deleting]:
            del self.pods[name]
        attempt = self.status.attempt
        self.all(lambda beat: beat.ready(attempt))
        self.settle()
        self.all(lambda beat: beat.starting(attempt))
        self.settle()
        return self

    @property
    def condition(self) -> str:
        """Reason of the Running condition."""
        found = self.status.condition("Running")
        return found.reason if found else ""

    def reasons(self) -> Sequence[str]:
        return [event.reason for event in self.events]


def quiet(decided: Plan) -> bool:
    """Whether a plan asks for nothing (directives are state, not an action)."""
    return (
        decided.status is None
        and not decided.delete_pods
        and not decided.create_pods
        and not decided.events
        and not decided.delete_run
        and decided.finalizers is None
    )


def a_spec(**fields: Any) -> Spec:
    return decode(Spec, a_run().with_spec(**fields).spec)


def a_policy(**fields: Any) -> RestartPolicy:
    return replace(RestartPolicy(), **fields)
