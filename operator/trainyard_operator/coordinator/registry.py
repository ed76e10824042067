"""What agents said and what they are to do: the coordinator's memory. No I/O, no clock of its own.

Everything here can be rebuilt: the beats come again within `BEAT_SECONDS`, the directives with the next
reconcile (docs/architecture.md part 2). So nothing is persisted, and a restarted operator starts empty.

Cost matters: with 1000 agents `hear` runs 500 times a second, so it compares a few fields and does not copy.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from trainyard_api.protocol import Action, Beat, Checkpoint, Directive
from trainyard_operator.clock import Clock
from trainyard_operator.plan.model import Member

MAX_SUPERSEDED = 8
"""Old incarnations remembered for each pod."""
PUBLISHES_TO_EXIT = 2
"""A pod that is not named is told to EXIT by the second publish after it was first heard, not by the first:
that one may come from a reconcile which had observed the run before the pod existed. (Reconciles of one run
never overlap, so the second began after the first had ended.)"""


class SupersededError(Exception):
    """The beat comes from an agent process that a newer one of the same pod has replaced."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A directive, encoded once for all the times that it is sent."""

    directive: Directive
    revision: str
    body: bytes

    @classmethod
    def of(cls, directive: Directive) -> Answer:
        return cls(directive, directive.revision, json.dumps(directive.to_json()).encode())


NOT_A_MEMBER = Answer.of(
    Directive(action=Action.EXIT, exit_code=0, reason="this pod is not a member of the current attempt")
)


@dataclass(slots=True)
class _Agent:
    """State of one pod's agent."""

    member: Member
    first_publish: int
    """How often the run had been published when the pod was first heard."""
    superseded: list[str] = field(default_factory=list)
    waiters: set[asyncio.Future[None]] = field(default_factory=set)

    def wake(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)


@dataclass(slots=True)
class _Run:
    """State of one run."""

    agents: dict[str, _Agent] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    publishes: int = 0
    last_ring: float = float("-inf")


def _decisive(beat: Beat) -> tuple[object, ...]:
    """The part of a beat that a decision may hang on at once."""
    return (
        beat.phase,
        beat.attempt,
        beat.ready,
        beat.failure,
        beat.blocked,
        beat.checkpoint,
        beat.resumed,
        beat.incarnation,
        beat.pod_ip,
        beat.node_index,
    )


class Registry:
    """Newest beat of every agent and newest directive for it. For one event loop; not thread-safe.

    `on_change(run_uid)` is called when a beat may change a decision: at once for phase, attempt, readiness,
    failure, checkpoint, resume, a new process or a first beat; for mere progress at most every
    `progress_interval` seconds and run. `on_commit(run_uid, checkpoint)` is called when an agent tells of another
    commit than before; agents of one run tell of the same ones. Neither may block.
    """

    def __init__(
        self,
        *,
        on_change: Callable[[str], None],
        clock: Clock,
        progress_interval: float = 1.0,
        on_commit: Callable[[str, Checkpoint], None] | None = None,
    ) -> None:
        self._on_change = on_change
        self._on_commit = on_commit
        self._clock = clock
        self._progress_interval = progress_interval
        self._runs: dict[str, _Run] = {}
        self._closed = False

    # ---- agents -------------------------------------------------------------------------------------

    def hear(self, run_uid: str, beat: Beat) -> None:
        """Takes in a beat that was found to be authentic and of this run.

        Raises SupersededError when a newer agent process of the pod was heard before.
        """
        now = self._clock.time()
        run = self._runs.setdefault(run_uid, _Run())
        member = Member(beat=beat, received=now)
        agent = run.agents.get(beat.pod_uid)
        if agent is None:
            run.agents[beat.pod_uid] = _Agent(member, first_publish=run.publishes)
            self._tell_commit(run_uid, beat.checkpoint, None)
            self._ring(run_uid, run, now)
            return
        before = agent.member.beat
        if beat.incarnation != before.incarnation:
            if beat.incarnation in agent.superseded:
                raise SupersededError(beat.pod_name)
            agent.superseded = [*agent.superseded, before.incarnation][-MAX_SUPERSEDED:]
        agent.member = member
        self._tell_commit(run_uid, beat.checkpoint, before.checkpoint)
        minor = beat.progress != before.progress or beat.warnings != before.warnings
        if _decisive(beat) != _decisive(before) or (minor and now - run.last_ring >= self._progress_interval):
            self._ring(run_uid, run, now)

    def answer(self, run_uid: str, pod_uid: str) -> Answer | None:
        """What the pod is to do; None when that is not known (yet)."""
        run = self._runs.get(run_uid)
        if run is None or not run.publishes:
            return None
        named = run.answers.get(pod_uid)
        if named is not None:
            return named
        agent = run.agents.get(pod_uid)
        if agent is None or run.publishes - agent.first_publish < PUBLISHES_TO_EXIT:
            return None
        return NOT_A_MEMBER

    async def wait(self, run_uid: str, pod_uid: str, seen: str, seconds: float) -> Answer | None:
        """The answer as soon as its revision is not `seen`, or whatever it is after `seconds`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            answer = self.answer(run_uid, pod_uid)
            left = deadline - loop.time()
            if self._closed or left <= 0 or (answer is not None and answer.revision != seen):
                return answer
            run = self._runs.get(run_uid)
            agent = run.agents.get(pod_uid) if run else None
            if agent is None:
                return answer
            waiter: asyncio.Future[None] = loop.create_future()
            agent.waiters.add(waiter)
            timer = loop.call_later(left, _resolve, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                agent.waiters.discard(waiter)

    # ---- the operator -------------------------------------------------------------------------------

    def publish(self, run_uid: str, directives: Mapping[str, Directive]) -> None:
        """Replaces the directives of a run (by pod UID) and wakes the agents that are concerned.

        Pods of the run that are not named are told to EXIT (see PUBLISHES_TO_EXIT).
        """
        run = self._runs.setdefault(run_uid, _Run())
        before = run.answers
        run.answers = {
            pod_uid: old
            if (old := before.get(pod_uid)) is not None and old.directive == directive
            else Answer.of(directive)
            for pod_uid, directive in directives.items()
        }
        run.publishes += 1
        undecided = False
        for pod_uid, agent in run.agents.items():
            answer = run.answers.get(pod_uid)
            if answer is None and run.publishes - agent.first_publish == 1:
                undecided = True
            if agent.waiters and (answer is None or answer is not before.get(pod_uid)):
                agent.wake()
        if undecided:
            self._ring(run_uid, run, self._clock.time())

    def members(self, run_uid: str) -> Mapping[str, Member]:
        """The newest word of every agent of the run that was heard, by pod UID. A copy."""
        run = self._runs.get(run_uid)
        return {} if run is None else {uid: agent.member for uid, agent in run.agents.items()}

    def forget(self, run_uid: str) -> None:
        """Drops a run that is gone; its waiting agents are answered at once."""
        run = self._runs.pop(run_uid, None)
        for agent in run.agents.values() if run else ():
            agent.wake()

    def retain(self, runs: Collection[str], pods: Collection[str]) -> None:
        """Forgets all runs and pods but these (UIDs): the bound on memory. Call it every minute or so."""
        for run_uid in [uid for uid in self._runs if uid not in runs]:
            self.forget(run_uid)
        for run in self._runs.values():
            for pod_uid in [uid for uid in run.agents if uid not in pods]:
                run.agents.pop(pod_uid).wake()

    def connected(self, ttl: float) -> int:
        """How many agents were heard in the last `ttl` seconds."""
        since = self._clock.time() - ttl
        return sum(a.member.received >= since for run in self._runs.values() for a in run.agents.values())

    def close(self) -> None:
        """From now on nobody waits: the server is about to stop."""
        self._closed = True
        for run in self._runs.values():
            for agent in run.agents.values():
                agent.wake()

    def _tell_commit(self, run_uid: str, now: Checkpoint | None, before: Checkpoint | None) -> None:
        if self._on_commit is not None and now is not None and now != before:
            self._on_commit(run_uid, now)

    def _ring(self, run_uid: str, run: _Run, now: float) -> None:
        run.last_ring = now
        self._on_change(run_uid)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
