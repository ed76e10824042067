"""Is the current attempt over, and why: reports of agents, ends of pods, silence, time-outs -> one cause.

Only members of the current attempt count, and only what they say about it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainyard_api.contract import ExitCode, FailureClass, Reason
from trainyard_api.protocol import BEAT_SECONDS, AgentPhase, Failure
from trainyard_api.serde import decode
from trainyard_api.v1alpha1 import Cause
from trainyard_operator.plan.membership import Slot, State, outcome
from trainyard_operator.plan.progress import has_stepped
from trainyard_operator.plan.texts import clean, whole
from trainyard_operator.plan.times import parse
from trainyard_operator.plan.view import View

ECHO_WAIT = 2.5
"""Seconds to wait for the true cause when all reports look like echoes of a death that nobody reported: a
kubelet takes about a second to say that a container was killed, a live agent at most BEAT_SECONDS."""
LATE = 2.0
"""Seconds that a report may take to us. An agent repeats itself, so that its newest beat does not tell when
it first spoke: waiting also ends this long after the failure's own time would have it."""
ORPHAN_MARGIN = 2 * BEAT_SECONDS
"""Seconds after the first step from which an idle member is believed to be idle, not just late."""

EVICTIONS = frozenset(
    {
        "Evicted",
        "Preempting",
        "Preempted",
        "PreemptionByScheduler",
        "EvictionByEvictionAPI",
        "TerminationByKubelet",
        "DeletionByTaintManager",
        "DeletionByPodGC",
        "NodeShutdown",
        "Shutdown",
        "Terminated",
    }
)
"""`status.reason` of a pod, or reason of its DisruptionTarget condition (core/v1 and kubelet sources)."""
OUT_OF_MEMORY_TYPES = (
    "OutOfMemoryError",
    "torch.OutOfMemoryError",
    "torch.cuda.OutOfMemoryError",
    "MemoryError",
)
MAX_RANK = 2**31 - 1
"""int32 of the CRD's schema."""
KILLED = -9
KILLED_FROM_OUTSIDE = (137, 143)
"""128 + SIGKILL, 128 + SIGTERM: nothing that the program did."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that ends the attempt."""

    cause: Cause
    time: float
    """When it happened, by the clock of whoever saw it."""
    echo: bool = False
    """It looks like the consequence of another rank's death."""
    machine: bool = False
    """A pod or an agent went away: never an echo of what a worker did."""
    reported: float | None = None
    """When the operator heard it from an agent."""

    @property
    def charged(self) -> bool:
        """A worker that met a newer attempt's fence is no failure of the run (contract.ExitCode)."""
        return self.cause.exit_code != ExitCode.FENCED


def findings(view: View) -> tuple[Finding, ...]:
    """Everything that ends the current attempt."""
    found = [f for slot in view.gang.slots if (f := _of_slot(view, slot)) is not None]
    if not found and (late := _start_timeout(view)) is not None:
        found.append(late)
    return tuple(found)


def root_cause(view: View, found: tuple[Finding, ...]) -> Finding:
    """The one to name: no echo if possible, a lost machine before its consequences, then the earliest.

    If there are only echoes and somebody has not spoken, it is his death that they echo: a machine's.
    """
    root = min(found, key=lambda f: (f.echo, not f.machine, f.time, f.cause.rank or 0))
    undone = sum(slot.state is not State.DONE for slot in view.gang.slots)
    if root.echo and root.cause.failure_class == FailureClass.USER and len(found) < undone:
        return replace(root, cause=replace(root.cause, failure_class=str(FailureClass.INFRASTRUCTURE)))
    return root


def still_waiting(view: View, found: tuple[Finding, ...]) -> float:
    """Seconds for which more reports may still come in; <= 0: decide now."""
    reports = [f for f in found if f.reported is not None]
    if not found or len(reports) < len(found):
        return 0.0  # a lost machine needs no second opinion
    first = min(f.reported for f in reports if f.reported is not None)
    if len(found) == len(view.gang.slots):
        return 0.0  # everybody has spoken
    if any(f.cause.exit_code == KILLED and not f.echo for f in found):
        return 0.0  # nothing that another rank did kills with SIGKILL: this is the cause
    wait = view.settings.coalesce
    if all(f.echo for f in found):
        wait = max(wait, ECHO_WAIT)
    happened = min(f.time for f in reports)
    return min(first + wait, happened + wait + LATE) - view.now


def _of_slot(view: View, slot: Slot) -> Finding | None:
    pod, beat = slot.pod, slot.beat
    if slot.state is State.DONE:
        return None
    if not view.started and (pod is None or pod.created_in != view.attempt):
        return None  # it never was part of this attempt: it is replaced, and nobody is charged
    report = view.started and beat is not None and beat.attempt == view.attempt
    if slot.state in (State.MISSING, State.LEAVING):
        return _gone(view, slot)
    if slot.state is State.ENDED and pod is not None:
        return _ended(view, slot)
    if report and beat is not None and beat.phase == AgentPhase.FAILED:
        failure = beat.failure if beat.failure and beat.failure.attempt == view.attempt else None
        return _reported(
            view, slot, failure or Failure(attempt=view.attempt, message="the agent gave no details")
        )
    if beat is not None and beat.blocked and not view.started:
        refused = Failure(attempt=view.attempt, exit_code=ExitCode.CONFIG, message=beat.blocked)
        return _reported(view, slot, refused)
    if slot.state is State.LOST:
        return _machine(view, slot, Reason.AGENT_LOST, _silence(view, slot))
    if _orphaned(view, slot):
        message = (
            "the agent has no workers of this attempt any more (it was restarted, or its address changed)"
        )
        return _machine(view, slot, Reason.AGENT_LOST, message)
    return None


def _reported(view: View, slot: Slot, failure: Failure) -> Finding:
    """A worker's end, as its agent saw it."""
    reason, charged_to = _classify(failure)
    exception, message = clean(failure.exception, 256), clean(failure.message)
    received = slot.member.received if slot.member else view.now
    return Finding(
        cause=Cause(
            reason=str(reason),
            failure_class=str(charged_to),
            message=message,
            rank=whole(failure.rank, MAX_RANK),
            node_index=slot.index,
            pod=slot.pod.name if slot.pod else "",
            node=slot.pod.node if slot.pod else "",
            exit_code=_exit_code(failure.exit_code),
            exception=exception,
        ),
        time=failure.time if failure.time > 0 else received,
        echo=failure.collateral and reason is not Reason.CONFIGURATION,
        reported=received,
    )


def _classify(failure: Failure) -> tuple[Reason, FailureClass]:
    code = failure.exit_code
    if code == ExitCode.CONFIG:
        return Reason.CONFIGURATION, FailureClass.CONFIGURATION
    if failure.exception.rsplit(".", 1)[-1] in OUT_OF_MEMORY_TYPES:
        return Reason.OUT_OF_MEMORY, FailureClass.USER
    if code is None and not failure.exception:
        return Reason.WORKER_FAILED, FailureClass.INFRASTRUCTURE  # the launcher: rendezvous, fork
    if code is not None and code < 0:
        return Reason.WORKER_KILLED, FailureClass.USER
    return Reason.WORKER_FAILED, FailureClass.USER


def _ended(view: View, slot: Slot) -> Finding:
    """A pod that is Failed, or Succeeded without having succeeded in this attempt."""
    pod = slot.pod
    assert pod is not None  # noqa: S101 - for the type checker; ENDED slots have one
    said = _last_words(view, slot)
    if said is not None:
        return _reported(view, slot, said)
    code = pod.exit_code
    if pod.reason in EVICTIONS:
        return _machine(view, slot, Reason.EVICTED, pod.message or pod.reason)
    if pod.phase == "Succeeded":
        return _machine(view, slot, Reason.POD_LOST, "the pod was asked to stop before the run was over")
    if code == ExitCode.CONFIG:
        return _machine(view, slot, Reason.CONFIGURATION, pod.message, FailureClass.CONFIGURATION)
    if pod.terminated_reason == "OOMKilled":
        message = "the container used more memory than resources.limits.memory allows"
        return _machine(view, slot, Reason.OUT_OF_MEMORY, message, FailureClass.USER)
    message = pod.message or pod.termination_message or pod.reason or "the container ended"
    outside = code is None or code in KILLED_FROM_OUTSIDE
    charged_to = FailureClass.INFRASTRUCTURE if outside else FailureClass.USER
    return _machine(view, slot, Reason.POD_FAILED, message, charged_to)


def _last_words(view: View, slot: Slot) -> Failure | None:
    """The worker failure of this attempt that the agent left as its termination message."""
    said = outcome(slot.pod) if slot.pod else {}
    if said.get("attempt") != view.attempt or said.get("outcome") != "failed":
        return None
    try:
        return decode(Failure, said)
    except ValueError:
        return None


def _gone(view: View, slot: Slot) -> Finding:
    pod = slot.pod
    if pod is None:
        return _machine(view, slot, Reason.POD_LOST, "the pod is gone")
    if pod.reason in EVICTIONS:
        return _machine(view, slot, Reason.EVICTED, pod.message or pod.reason)
    return _machine(view, slot, Reason.POD_LOST, pod.message or "the pod was deleted")


def _silence(view: View, slot: Slot) -> str:
    if slot.member is None and not view.started:
        return (
            "the agent was never heard since its container started: can the pod reach the operator "
            f"at {view.settings.coordinator_url}? (NetworkPolicy, Service)"
        )
    return f"nothing was heard from the agent for {view.settings.agent_ttl:g} s"


def _orphaned(view: View, slot: Slot) -> bool:
    """Whether a member that is alive no longer runs the attempt that the others are in the middle of.

    A directive alone cannot tell: an agent that was told RUN a moment ago is idle as well, and gets RUN again
    after an operator's restart. But a step of the attempt needs all ranks, hence every member had started
    before the first step. A member that says, ORPHAN_MARGIN after that step, that it does not run the attempt
    was started anew (a new incarnation with none of the old one's workers). If it were told RUN it would wait
    at a rendezvous that the others have left, and they would wait for its workers.
    """
    pod, member = slot.pod, slot.member
    if not view.started or pod is None or member is None:
        return False
    if member.beat.pod_ip and pod.ip and member.beat.pod_ip != pod.ip:
        return True
    stepped = parse(view.entry.first_step_time)
    if stepped is None or member.received < stepped + ORPHAN_MARGIN:
        return False
    return member.beat.attempt < view.attempt or (
        member.beat.attempt == view.attempt and member.beat.phase == AgentPhase.IDLE
    )


def _start_timeout(view: View) -> Finding | None:
    limit = view.spec.restart_policy.start_timeout_seconds
    if view.run_time is None or has_stepped(view) or view.now < view.run_time + limit:
        return None
    message = f"no step was taken within {limit} s after the gang was told to run"
    cause = Cause(reason=str(Reason.START_TIMEOUT), failure_class=str(FailureClass.USER), message=message)
    return Finding(cause=cause, time=view.now)


def _machine(
    view: View,
    slot: Slot,
    reason: Reason,
    message: str,
    charged_to: FailureClass = FailureClass.INFRASTRUCTURE,
) -> Finding:
    pod = slot.pod
    return Finding(
        cause=Cause(
            reason=str(reason),
            failure_class=str(charged_to),
            message=clean(message),
            node_index=slot.index,
            pod=pod.name if pod else "",
            node=pod.node if pod else "",
            exit_code=_exit_code(pod.exit_code) if pod else None,
        ),
        time=view.now,
        machine=True,
    )


def _exit_code(code: int | None) -> int | None:
    return None if code is None else min(max(code, -255), 255)
