"""A cluster in miniature for the planner: API server, lagging caches, kubelets, agents, and all their faults.

The fault model is Anvil's (OSDI'24): the operator may crash between any two of its writes, a request may be
dropped, a pod monkey deletes and kills pods, and events arrive late; in the end the faults stop. The
coordinator's memory is the real one. Promises that must hold at every write are checked at every write and
raise `Violation`.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.builders import RUN_UID, SETTINGS, T0, Planner, RunBuilder, a_run, quiet
from trainyard_api.contract import FINALIZER
from trainyard_api.protocol import Action, AgentPhase, Beat, Directive, Failure, Progress, Resumed
from trainyard_api.v1alpha1 import Status, TrainingRun
from trainyard_operator.coordinator.registry import Registry
from trainyard_operator.plan import Observed, Plan, plan
from trainyard_operator.plan.cleanup import MAX_TRIES
from trainyard_operator.plan.cleanup_pod import cleanup_number
from trainyard_operator.plan.model import PodView
from trainyard_operator.plan.names import parse_pod_name

NODES = 2
TAIL_ROUNDS = 150
CHECKPOINT_EVERY = 5
TRAINS = (AgentPhase.STARTING, AgentPhase.RUNNING)


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class Agent:
    """PID 1 of one pod, as docs/architecture.md part 3 has it."""

    uid: str
    name: str
    index: int
    ip: str
    incarnation: int = 0
    newest: int = 0
    launched: int = 0
    attempt: int = 0
    phase: AgentPhase = AgentPhase.IDLE
    ready: bool = True
    step: int = 0
    stepped_at: float | None = None
    resumed: int = 0
    failure: Failure | None = None
    cut_off: bool = False

    def beat(self) -> Beat:
        stepped = self.stepped_at is not None
        return Beat(
            pod_name=self.name,
            pod_uid=self.uid,
            incarnation=f"{self.uid}/{self.incarnation}",
            node_index=self.index,
            pod_ip=self.ip,
            attempt=self.attempt,
            phase=self.phase,
            ready=self.ready,
            progress=Progress(step=self.step) if stepped else None,
            resumed=Resumed(attempt=self.attempt, step=self.resumed, first_step_time=self.stepped_at)
            if stepped
            else None,
            failure=self.failure,
        )

    def obey(self, told: Directive) -> None:
        if self.phase is AgentPhase.DRAINING or told.attempt < self.newest:
            return
        self.newest = max(self.newest, told.attempt)
        if told.action is Action.HOLD and told.attempt > self.attempt:
            self._reset(told.attempt, AgentPhase.IDLE)
        if told.action is Action.RUN and told.attempt > self.launched:
            self._reset(told.attempt, AgentPhase.STARTING)
            self.launched = told.attempt

    def _reset(self, attempt: int, phase: AgentPhase) -> None:
        self.attempt, self.phase, self.failure, self.stepped_at = attempt, phase, None, None


@dataclass
class Clock:
    now: float = T0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError


class World:
    """Everything outside the planner."""

    def __init__(self, planner: Planner = plan, run: RunBuilder | None = None) -> None:
        self.planner = planner
        self.clock = Clock()
        self.builder = (run or a_run()).with_nodes(NODES).restarting(maxRestarts=10**6, noProgressLimit=10**6)
        self.builder = self.builder.restarting(maxInfrastructureRestarts=10**6)
        self.status = Status()
        self.version = 1
        self.pods: dict[str, PodView] = {}
        self.versions: dict[str, int] = {}
        self.agents: dict[str, Agent] = {}
        self.committed = 0
        self.stored = False
        """Whether anything of the run is in the bucket."""
        self.gone = False
        """The run is no more."""
        self.harms = 0
        self.changes: list[tuple[str, PodView | None, int]] = []
        self.told: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
        self.ran: set[int] = set()
        self.log: list[str] = []
        self._tick = 1
        self._uids = 0
        self.boot()

    # ---- the operator process -----------------------------------------------------------------------

    def boot(self) -> None:
        """A new process: lists are fresh, memory is empty."""
        self.log.append("operator starts")
        self.registry = Registry(on_change=lambda uid: None, clock=self.clock)
        self.listening_since = self.clock.now
        self.seen_run = (self.builder, self.status, self.version)
        self.seen = {name: (pod, self.versions[name]) for name, pod in self.pods.items()}
        self.cursor = len(self.changes)
        self.status_written = 0.0

    def observed(self) -> Observed:
        builder, status, _ = self.seen_run
        run: TrainingRun = replace(builder.build(), status=status)
        return Observed(
            run=run,
            pods=tuple(pod for pod, _ in self.seen.values()),
            members=self.registry.members(RUN_UID),
            now=self.clock.now,
            listening_since=self.listening_since,
            status_written=self.status_written,
        )

    def reconcile(self, *, crash_after: int | None = None, drop: int | None = None) -> Plan:
        """One round. It may crash after so many actions, or have one request dropped."""
        if self.gone:
            return Plan()
        decided = self.planner(self.observed(), SETTINGS)
        actions: list[Callable[[], bool]] = []
        guarded = decided.status is not None or decided.finalizers is not None
        if decided.status is not None:
            actions.append(lambda: self._write(decided.status))
        if decided.finalizers is not None:
            actions.append(lambda: self._finalize(decided.finalizers or ()))
        actions += [lambda d=d: self._api_delete(d.name, d.uid) for d in decided.delete_pods]
        actions += [lambda c=c: self._api_create(c.name) for c in decided.create_pods]
        if decided.directives is not None:
            actions.append(lambda: self._publish(decided))
        for number, act in enumerate(actions):
            if crash_after is not None and number >= crash_after:
                self.boot()
                return decided
            dropped = drop == number
            if dropped:
                self.log.append(f"request {number} is dropped")
            if (dropped or not act()) and number == 0 and guarded:
                self.seen_run = (self.builder, self.status, self.version)  # read again after a conflict
                return decided
        if crash_after is not None:
            self.boot()
        return decided

    def _write(self, status: Status | None) -> bool:
        assert status is not None
        if self.seen_run[2] != self.version:
            return False
        before, after = self.status, Status.from_json(status.to_json())
        self.log.append(f"status: attempt {after.attempt} {after.phase} {after.restarts}")
        self._check_write(before, after)
        self.status = after
        self.version += 1
        self.status_written = self.clock.now
        self.seen_run = (self.builder, self.status, self.version)
        return True

    def _finalize(self, finalizers: tuple[str, ...]) -> bool:
        if self.seen_run[2] != self.version:
            return False
        had = FINALIZER in (self.builder.metadata.get("finalizers") or ())
        cleanup = self.status.cleanup
        if had and FINALIZER not in finalizers:
            self.log.append(f"released: {cleanup}")
            if self.status.attempt > 0 and (cleanup is None or not cleanup.result):
                raise Violation(f"released before the result is written: {cleanup}")
            if cleanup is not None and cleanup.result == "Deleted" and self.stored:
                raise Violation("said to be deleted, and it is not")
        self.builder = self.builder.with_finalizers(*finalizers)
        self.version += 1
        self.seen_run = (self.builder, self.status, self.version)
        self._collect()
        return True

    def _collect(self) -> None:
        """The API server drops a deleted run that nothing holds, and the garbage collector its pods."""
        meta = self.builder.metadata
        if "deletionTimestamp" in meta and not meta.get("finalizers"):
            self.gone = True
            for name in list(self.pods):
                self.terminate(name)

    def _api_delete(self, name: str, uid: str) -> bool:
        pod = self.pods.get(name)
        if pod is not None and pod.uid == uid:
            self.log.append(f"delete {name}")
            self.terminate(name)
            known = self.seen.get(name)
            if known is not None:
                self.seen[name] = (replace(known[0], deleting=True), known[1])
        return True

    def _api_create(self, name: str) -> bool:
        index, attempt = parse_pod_name(name) or (-1, 0)
        self._check_create(name)
        if attempt > self.status.attempt:
            raise Violation(f"{name} is created before attempt {attempt} is persisted")
        if name in self.pods:
            self.seen[name] = (self.pods[name], self.versions[name])
            return True
        if any(key[0] == attempt and key[1] == index for key in self.told):
            raise Violation(f"the name {name} is used again after its first bearer ran")
        self.log.append(f"create {name}")
        self._uids += 1
        pod = PodView(
            name=name,
            uid=f"{name}#{self._uids}",
            index=index,
            created_in=attempt,
            phase="Pending",
            creation_time=self.clock.now,
        )
        self.put(pod)
        self.seen[name] = (pod, self.versions[name])
        return True

    def _publish(self, decided: Plan) -> bool:
        directives = decided.directives or {}
        runs = {uid: d for uid, d in directives.items() if d.action is Action.RUN}
        if any(d.attempt != self.status.attempt for d in runs.values()):
            raise Violation("RUN for an attempt that is not the persisted one")
        if runs:
            ranks = sorted(d.node_rank for d in runs.values())
            attempt = self.status.attempt
            if attempt not in self.ran and ranks != list(range(NODES)):
                raise Violation(f"attempt {attempt} is told to run with ranks {ranks}")
            if len({(d.master_addr, d.master_port, d.nodes) for d in runs.values()}) > 1:
                raise Violation("members of one attempt are told to meet at different places")
            self.ran.add(attempt)
        for told in directives.values():
            if told.action is Action.HOLD and told.attempt in self.ran:
                raise Violation(f"HOLD of attempt {told.attempt} after its RUN")
        self.registry.publish(RUN_UID, directives)
        return True

    # ---- promises -----------------------------------------------------------------------------------

    def _check_create(self, name: str) -> None:
        number = cleanup_number(self.builder.name, name)
        meta = self.builder.metadata
        if number is None:
            if self.deletes and FINALIZER not in (meta.get("finalizers") or ()):
                raise Violation(f"{name} is created and nothing holds the run")
            return
        if self.status.cleanup is None or self.status.cleanup.tries != number or number > MAX_TRIES:
            raise Violation(f"{name} is created and the status has {self.status.cleanup}")
        alive = [p.name for p in self.pods.values() if p.phase in ("Pending", "Running") and p.name != name]
        if "deletionTimestamp" not in meta or alive:
            raise Violation(f"{name} is created beside {alive}")

    @property
    def deletes(self) -> bool:
        return self.builder.build().spec.checkpoint.deletes

    def _check_write(self, before: Status, after: Status) -> None:
        if after.cleanup != before.cleanup and "deletionTimestamp" not in self.builder.metadata:
            raise Violation(f"cleanup of a run that is not deleted: {after.cleanup}")
        if before.finished and replace(after, cleanup=before.cleanup) != before:
            raise Violation(f"the status of a finished run is written: {after.phase}")
        if after.attempt < before.attempt:
            raise Violation(f"the attempt goes back from {before.attempt} to {after.attempt}")
        charged = _charges(after) - _charges(before)
        if charged not in (0, 1) or (charged and after.attempt != before.attempt + 1):
            raise Violation(f"{charged} charges with attempt {before.attempt} -> {after.attempt}")
        if _charges(after) > self.harms:
            raise Violation(
                f"{_charges(after)} failures are charged and {self.harms} happened: {after.root_cause}"
            )
        training = sorted(n for n in self.pods if cleanup_number(self.builder.name, n) is None)
        if after.is_true("Suspended") and training:
            raise Violation(f"Suspended while there are pods: {training}")
        if len(after.attempts) > 10:
            raise Violation("history is not bounded")

    # ---- the cluster --------------------------------------------------------------------------------

    def put(self, pod: PodView) -> None:
        self._tick += 1
        self.pods[pod.name] = pod
        self.versions[pod.name] = self._tick
        self.changes.append((pod.name, pod, self._tick))

    def remove(self, name: str) -> None:
        self._tick += 1
        pod = self.pods.pop(name)
        self.agents.pop(pod.uid, None)
        self.changes.append((name, None, self._tick))

    def terminate(self, name: str) -> None:
        """A graceful delete: a pod without a node goes at once."""
        pod = self.pods[name]
        if pod.phase == "Pending":
            self.remove(name)
        elif not pod.deleting:
            self.put(replace(pod, deleting=True))

    def deliver(self, count: int = 10**6) -> None:
        """The watches catch up by `count` events; the run's is one of them."""
        for name, pod, version in self.changes[self.cursor : self.cursor + count]:
            known = self.seen.get(name)
            if known is not None and known[1] >= version:
                continue
            if pod is None:
                self.seen.pop(name, None)
            else:
                self.seen[name] = (pod, version)
        self.cursor = min(len(self.changes), self.cursor + count)
        self.seen_run = (self.builder, self.status, self.version)

    def kubelet(self, name: str) -> None:
        """The next thing that the node of this pod does."""
        pod = self.pods[name]
        agent = self.agents.get(pod.uid)
        if cleanup_number(self.builder.name, name) is not None and not pod.deleting:
            self._clean(pod)
        elif pod.deleting:
            if agent is not None and not agent.cut_off and agent.phase is not AgentPhase.DRAINING:
                agent.phase = AgentPhase.DRAINING
            else:
                self.remove(name)
        elif pod.phase == "Pending":
            self._tick += 1
            ip = f"10.0.{self._tick // 250}.{self._tick % 250}"
            self.put(replace(pod, phase="Running", ip=ip, node="n", started_at=self.clock.now))
            self.agents[pod.uid] = Agent(uid=pod.uid, name=name, index=pod.index, ip=ip)

    def _clean(self, pod: PodView) -> None:
        """The next thing that a cleanup pod does."""
        if pod.phase == "Pending":
            self.put(replace(pod, phase="Running", ip="10.1.0.1", node="n", started_at=self.clock.now))
        elif pod.phase == "Running":
            self.stored = False
            said = '{"outcome": "deleted", "message": "all of it"}'
            self.put(replace(pod, phase="Succeeded", exit_code=0, termination_message=said))

    def talk(self, uid: str) -> None:
        """One beat and its answer."""
        agent = self.agents[uid]
        if agent.cut_off:
            return
        self.registry.hear(RUN_UID, agent.beat())
        answer = self.registry.answer(RUN_UID, uid)
        if answer is None:
            return
        told = answer.directive
        if told.action is Action.EXIT:
            if agent.phase is not AgentPhase.DRAINING:
                self._exit(agent, told.exit_code)
            return
        if (
            told.action is Action.RUN
            and agent.phase is not AgentPhase.DRAINING
            and told.attempt >= agent.newest
        ):
            known = self.told[told.attempt, agent.index]
            known.add(uid)
            if len(known) > 1:
                raise Violation(f"two pods with index {agent.index} were told RUN {told.attempt}: {known}")
        agent.obey(told)

    def _exit(self, agent: Agent, code: int) -> None:
        pod = self.pods[agent.name]
        said = f'{{"attempt": {agent.attempt}, "outcome": "{agent.phase}"}}'
        phase = "Failed" if code else "Succeeded"
        self.put(replace(pod, phase=phase, exit_code=code, termination_message=said))
        del self.agents[agent.uid]

    def train(self) -> None:
        """All ranks take a step, if all are in one attempt."""
        gang = self._gang()
        if gang is None:
            return
        for agent in gang:
            if agent.stepped_at is None:
                agent.resumed = agent.step = self.committed
                agent.stepped_at = self.clock.now
            agent.step += 1
            agent.phase = AgentPhase.RUNNING
        if gang[0].step % CHECKPOINT_EVERY == 0:
            self.committed = gang[0].step
            self.stored = True

    def finish(self) -> None:
        """The program ends well."""
        for agent in self._gang() or ():
            if agent.phase is AgentPhase.RUNNING:
                agent.phase = AgentPhase.SUCCEEDED

    def _gang(self) -> list[Agent] | None:
        attempt = max((a.attempt for a in self.agents.values()), default=0)
        gang = [
            a for a in self.agents.values() if a.attempt == attempt and a.phase in TRAINS and not a.cut_off
        ]
        return gang if sorted(a.index for a in gang) == list(range(NODES)) else None

    # ---- faults: each may be charged at most once ---------------------------------------------------

    def crash_worker(self, uid: str) -> None:
        agent = self.agents[uid]
        if agent.phase in TRAINS:
            self._harm(f"a worker of {agent.name} fails in attempt {agent.attempt}")
            agent.phase = AgentPhase.FAILED
            agent.failure = Failure(attempt=agent.attempt, rank=agent.index, exit_code=1, time=self.clock.now)

    def delete_pod(self, name: str) -> None:
        self._harm(f"{name} is deleted")
        self.terminate(name)

    def force_delete_pod(self, name: str) -> None:
        self._harm(f"{name} is gone")
        self.remove(name)

    def kill_pod(self, name: str) -> None:
        pod = self.pods[name]
        if pod.phase == "Running":
            self._harm(f"{name} is killed")
            self.agents.pop(pod.uid, None)
            self.put(replace(pod, phase="Failed", exit_code=137))

    def cut_off(self, uid: str) -> None:
        """The node is cut off; its pod stays Running for a long time."""
        self._harm(f"{self.agents[uid].name} is cut off")
        self.agents[uid].cut_off = True

    def restart_agent(self, uid: str) -> None:
        """An agent process is replaced by a new one, which knows nothing."""
        old = self.agents[uid]
        if not old.cut_off and old.phase is not AgentPhase.DRAINING:
            self._harm(f"the agent of {old.name} is born again")
            self.agents[uid] = Agent(
                uid=uid, name=old.name, index=old.index, ip=old.ip, incarnation=old.incarnation + 1
            )

    def touch(self) -> None:
        """Somebody labels the run: the operator's next write is a conflict."""
        self.version += 1

    def delete_run(self) -> None:
        if "deletionTimestamp" not in self.builder.metadata:
            self.log.append("the run is deleted")
            self.builder = self.builder.deleting()
            self.version += 1
            self._collect()

    def suspend(self, suspend: bool) -> None:
        self.log.append(f"suspend {suspend}")
        self.builder = self.builder.suspended(suspend)
        self.version += 1

    def _harm(self, what: str) -> None:
        self.log.append(what)
        self.harms += 1

    # ---- time ---------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Time passes; everybody who can be heard is heard often enough."""
        left = seconds
        while left > 0:
            self.clock.now += min(left, 2.0)
            left -= 2.0
            for uid in list(self.agents):
                if uid in self.agents:
                    self.talk(uid)

    def fair_round(self) -> Plan:
        """Everybody gets his turn, and nothing goes wrong."""
        self.deliver()
        decided = self.reconcile()
        for name in list(self.pods):
            if name in self.pods:
                self.kubelet(name)
        self.advance(2.0)
        self.train()
        return decided

    def tail(self) -> int:
        """The faults stop. Rounds until the run is where it should be; Violation if that takes too many."""
        for number in range(TAIL_ROUNDS):
            decided = self.fair_round()
            if quiet(decided) and self.settled():
                self.deliver()
                self._check_idle()
                return number
        trace = "\n".join(self.log[-30:])
        raise Violation(f"not settled after {TAIL_ROUNDS} fair rounds: {self.status}\n{trace}")

    def settled(self) -> bool:
        status = self.status
        if "deletionTimestamp" in self.builder.metadata:
            return self.gone and not self.pods
        if status.finished:
            return True
        if self.builder.spec.get("suspend"):
            return status.is_true("Suspended") and not self.pods
        gang = self._gang()
        return (
            status.phase == "Running"
            and gang is not None
            and gang[0].attempt == status.attempt
            and len(self.pods) == NODES
        )

    def _check_idle(self) -> None:
        """Rounds without news do nothing."""
        self.clock.now += 11.0
        for uid in list(self.agents):
            self.talk(uid)
        self.reconcile()
        for _ in range(3):
            decided = self.reconcile()
            if not quiet(decided):
                raise Violation(f"a round without news does something: {decided}")
        self.boot()
        decided = self.reconcile()
        if not quiet(decided):
            raise Violation(f"a restart of the operator does something: {decided}")


def _charges(status: Status) -> int:
    return status.restarts.user + status.restarts.infrastructure


RULES: Counter[str] = Counter(
    fair_round=40,
    reconcile=30,
    deliver=14,
    kubelet=14,
    talk=20,
    train=8,
    advance=6,
    crash_operator=4,
    drop_request=3,
    restart_operator=1,
    crash_worker=2,
    delete_pod=1,
    force_delete_pod=1,
    kill_pod=1,
    cut_off=1,
    restart_agent=1,
    touch=1,
    suspend=1,
    resume=4,
    finish=1,
)
"""What may happen, and how often."""


def happen(world: World, rule: str, pick: int) -> None:
    """One thing happens; `pick` chooses among the pods, agents or amounts."""
    pods, agents = sorted(world.pods), sorted(world.agents)
    match rule:
        case "reconcile":
            world.reconcile()
        case "crash_operator":
            world.reconcile(crash_after=pick % 5)
        case "drop_request":
            world.reconcile(drop=pick % 4)
        case "restart_operator":
            world.boot()
        case "deliver":
            world.deliver(pick % 4)
        case "advance":
            world.advance(float(pick % 13))
        case "suspend":
            world.suspend(True)
        case "resume":
            world.suspend(False)
        case "train" | "finish" | "touch" | "fair_round" | "delete_run":
            getattr(world, rule)()
        case "kubelet" | "delete_pod" | "force_delete_pod" | "kill_pod":
            if pods:
                getattr(world, rule)(pods[pick % len(pods)])
        case _:
            if agents:
                getattr(world, rule)(agents[pick % len(agents)])


WITH_DELETION: Counter[str] = RULES + Counter(delete_run=2)
"""The same, and at some time the run is deleted."""


def live(planner: Planner, seed: int, steps: int, *, run: RunBuilder | None = None) -> World:
    """A random life with a fair end; of a run that deletes its checkpoints, one that ends with its deletion. Raises
    Violation."""
    dice = random.Random(seed)
    world = World(planner, run)
    rules = WITH_DELETION if world.deletes else RULES
    names, weights = list(rules), list(rules.values())
    for rule in dice.choices(names, weights, k=steps):
        happen(world, rule, dice.randrange(1000))
    world.tail()
    return world
