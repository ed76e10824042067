"""Who the members of an attempt are, and how each of them is.

Member i of attempt n is the pod with index i that was created in the highest attempt <= n; every other pod is
surplus. That is a function of persisted state (docs/architecture.md part 2): a restarted operator, or another
replica, derives the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from trainyard_api.protocol import AgentPhase, Beat
from trainyard_operator.plan.model import Member, Observed, PlanSettings, PodView

FIRST_BEAT_SECONDS = 60.0
"""How long an agent may take from its container's start to its first beat: a cold Python on a busy node."""
MOST_NODES = 10_000
"""Above this a size in the status was not written by us."""


class State(Enum):
    """How a member is. The last four can never run the attempt again."""

    DONE = auto()  # its workers of this attempt all exited with 0
    UP = auto()  # Running, and its agent was heard within the TTL
    BOOTING = auto()  # Pending, or not heard yet
    MISSING = auto()  # no such pod
    ENDED = auto()  # the pod is Failed or Succeeded
    LEAVING = auto()  # the pod is being deleted, or its agent drains
    LOST = auto()  # the agent is silent


UNUSABLE = (State.MISSING, State.ENDED, State.LEAVING, State.LOST)


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in the gang."""

    index: int
    state: State
    pod: PodView | None = None
    member: Member | None = None
    silent_at: float | None = None
    """When its agent counts as lost if nothing is heard until then."""

    @property
    def beat(self) -> Beat | None:
        return self.member.beat if self.member else None

    @property
    def unusable(self) -> bool:
        return self.state in UNUSABLE


@dataclass(frozen=True, slots=True)
class Gang:
    """The members of attempt `attempt`, and the pods that are none."""

    attempt: int
    slots: tuple[Slot, ...]
    surplus: tuple[PodView, ...]

    def count(self, *states: State) -> int:
        return sum(slot.state in states for slot in self.slots)


def choose(
    pods: Iterable[PodView], attempt: int, size: int
) -> tuple[dict[int, PodView], tuple[PodView, ...]]:
    """(member by index, surplus)."""
    chosen: dict[int, PodView] = {}
    surplus: list[PodView] = []
    for pod in sorted(pods, key=lambda p: (-p.created_in, p.name)):
        fits = 0 <= pod.index < size and 0 < pod.created_in <= attempt
        if fits and pod.index not in chosen:
            chosen[pod.index] = pod
        else:
            surplus.append(pod)
    return chosen, tuple(surplus)


def gang_of(
    observed: Observed, settings: PlanSettings, *, attempt: int, size: int, run_time: float | None
) -> Gang:
    """The gang of `attempt`. `run_time`: when it was told to run, None if it was not."""
    chosen, surplus = choose(observed.pods, attempt, size)
    slots = tuple(_slot(observed, settings, attempt, i, chosen.get(i), run_time) for i in range(size))
    return Gang(attempt, slots, surplus)


def told(observed: Observed, attempt: int, size: int) -> bool:
    """Whether some member says that it runs, or ran, `attempt`: then the gang was told to run."""
    chosen, _ = choose(observed.pods, attempt, size)
    beats = (observed.members[p.uid].beat for p in chosen.values() if p.uid in observed.members)
    begun = (AgentPhase.STARTING, AgentPhase.RUNNING, AgentPhase.SUCCEEDED, AgentPhase.FAILED)
    return any(beat.attempt == attempt and beat.phase in begun for beat in beats)


def outcome(pod: PodView) -> dict[str, Any]:
    """The agent's termination message; empty when it is anything else."""
    try:
        said = json.loads(pod.termination_message)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def succeeded(pod: PodView, member: Member | None, attempt: int) -> bool:
    """Whether the pod's part of `attempt` is done: its agent says so, or said so when it ended."""
    if member and member.beat.attempt == attempt and member.beat.phase == AgentPhase.SUCCEEDED:
        return True
    said = outcome(pod) if pod.phase == "Succeeded" else {}
    return said.get("outcome") == "succeeded" and said.get("attempt") == attempt


def _slot(  # noqa: PLR0917 - one member and what it is judged by
    observed: Observed,
    settings: PlanSettings,
    attempt: int,
    index: int,
    pod: PodView | None,
    run_time: float | None,
) -> Slot:
    if pod is None:
        return Slot(index, State.MISSING)
    member = observed.members.get(pod.uid)
    if succeeded(pod, member, attempt):
        return Slot(index, State.DONE, pod, member)
    if pod.phase in ("Failed", "Succeeded"):
        return Slot(index, State.ENDED, pod, member)
    if pod.deleting or (member and member.beat.phase == AgentPhase.DRAINING):
        return Slot(index, State.LEAVING, pod, member)
    silent_at = _silent_at(observed, settings, pod, member, run_time)
    if silent_at is not None and observed.now >= silent_at:
        return Slot(index, State.LOST, pod, member)
    heard = member is not None and observed.now - member.received < settings.agent_ttl
    # A beat from another address than the pod's is no proof that peers can reach the member.
    same_address = heard and member is not None and member.beat.pod_ip in ("", pod.ip)
    up = pod.phase == "Running" and bool(pod.ip) and heard and (same_address or run_time is not None)
    return Slot(index, State.UP if up else State.BOOTING, pod, member, silent_at)


def _silent_at(
    observed: Observed, settings: PlanSettings, pod: PodView, member: Member | None, run_time: float | None
) -> float | None:
    """When the agent is lost. Nobody is called silent for longer than this operator could have heard him."""
    since = observed.listening_since
    if member is not None:
        return max(since, member.received) + settings.agent_ttl
    if run_time is not None:  # it was up when the gang was told to run
        return max(since, run_time) + settings.agent_ttl
    if pod.phase == "Running":
        return max(since, pod.started_at or pod.creation_time) + max(FIRST_BEAT_SECONDS, settings.agent_ttl)
    return None
