"""Suspend and resume, as batch/v1 Job means it: no pods, and Suspended=True when the last one is gone."""

from __future__ import annotations

from dataclasses import replace

from trainyard_api.contract import ConditionType, Phase, Reason
from trainyard_operator.plan.attempts import closed, conditioned, nodes_status, stopped_clock
from trainyard_operator.plan.directives import exit_all
from trainyard_operator.plan.model import DeletePod, EventNote, Plan
from trainyard_operator.plan.times import rfc3339
from trainyard_operator.plan.view import View

SUSPENDED_PHASES = (Phase.SUSPENDING, Phase.SUSPENDED)
GONE_LOOK_SECONDS = 30.0
"""How often to look for the last pods even if no event comes."""


def is_suspended(view: View) -> bool:
    """Whether the run was stopped for a suspend, completely or not: to go on it needs a new attempt."""
    return view.status.phase in SUSPENDED_PHASES or view.status.is_true(ConditionType.SUSPENDED)


def suspended(view: View) -> Plan | None:
    """What to do while `spec.suspend` is set."""
    if not view.spec.suspend:
        return None
    deletes = tuple(
        DeletePod(name=p.name, uid=p.uid, why="the run is suspended")
        for p in view.observed.pods
        if not p.deleting
    )
    told = exit_all(view, 0, "the run is suspended")
    if view.observed.pods:
        if view.status.phase == Phase.SUSPENDING:
            return Plan(delete_pods=deletes, directives=told, requeue_after=GONE_LOOK_SECONDS)
        return _stop(view, deletes)
    if view.status.is_true(ConditionType.SUSPENDED):
        return Plan(directives=told)
    return _confirm(view)


def _stop(view: View, deletes: tuple[DeletePod, ...]) -> Plan:
    """The attempt ends without a cause and without a charge; the clock of activeDeadlineSeconds stands."""
    status = stopped_clock(view, closed(view, end=view.now) if view.attempt > 0 else view.status)
    status = replace(status, phase=str(Phase.SUSPENDING))
    message = f"waiting for {len(view.observed.pods)} pods to end"
    status = conditioned(view, status, ConditionType.RUNNING, False, Reason.SUSPENDING, message)
    status = conditioned(view, status, ConditionType.SUSPENDED, False, Reason.SUSPENDING, message)
    event = EventNote(
        reason=str(Reason.SUSPENDING), message="Stopping all pods: spec.suspend", action="Suspend"
    )
    told = exit_all(view, 0, "the run is suspended")
    return Plan(
        status=status, delete_pods=deletes, directives=told, events=(event,), requeue_after=GONE_LOOK_SECONDS
    )


def _confirm(view: View) -> Plan:
    """No pod is left."""
    status = view.status
    if view.attempt > 0 and not is_suspended(view):
        status = closed(view, end=view.now)
    status = stopped_clock(view, status)
    status = replace(status, phase=str(Phase.SUSPENDED), nodes=nodes_status(view.spec.nodes.desired, 0))
    message = f"suspended at step {status.step}" if status.step is not None else "suspended"
    status = conditioned(view, status, ConditionType.RUNNING, False, Reason.SUSPENDED, message)
    status = conditioned(view, status, ConditionType.SUSPENDED, True, Reason.SUSPENDED, message)
    event = EventNote(reason=str(Reason.SUSPENDED), message=f"No pods are left; {message}", action="Suspend")
    told = exit_all(view, 0, "the run is suspended")
    return Plan(status=status, directives=told, events=(event,))


def resumed_message(view: View) -> str:
    """For the attempt that ends a suspend."""
    return f"resumed at {rfc3339(view.now)} with attempt {max(view.attempt, 0) + 1}"
