"""How a run ends, and what is done about it afterwards. Terminal is terminal."""

from __future__ import annotations

from dataclasses import replace

from trainyard_api.contract import ConditionType, Phase, Reason
from trainyard_api.v1alpha1 import Cause, Status
from trainyard_operator.plan.attempts import closed, conditioned, duration, stopped_clock
from trainyard_operator.plan.deadlines import Soonest, expires_at
from trainyard_operator.plan.directives import exit_all
from trainyard_operator.plan.membership import State
from trainyard_operator.plan.model import DeletePod, EventNote, Plan
from trainyard_operator.plan.times import parse, rfc3339
from trainyard_operator.plan.view import View

LINGER_SECONDS = 60.0
"""How long a pod of a finished run may take to obey EXIT."""


def completed(view: View) -> Plan | None:
    """Complete, when every member's workers of the current attempt exited with 0."""
    if view.attempt < 1 or view.entry.end_time or view.gang.count(State.DONE) < len(view.gang.slots):
        return None
    status = stopped_clock(view, closed(view, end=view.now))
    step = f"step {status.step}" if status.step is not None else "its end"
    attempts = f"{view.attempt} attempt{'s' if view.attempt != 1 else ''}"
    message = f"training reached {step} in {duration(view):.0f} s and {attempts}"
    status = replace(status, phase=str(Phase.COMPLETE), progress="100%", completion_time=rfc3339(view.now))
    status = conditioned(view, status, ConditionType.RUNNING, False, Reason.SUCCEEDED, message)
    status = conditioned(view, status, ConditionType.COMPLETE, True, Reason.SUCCEEDED, message)
    event = EventNote(reason=str(Reason.SUCCEEDED), message=message.capitalize(), action="Complete")
    return Plan(
        status=status, directives=exit_all(view, 0, "the run is complete"), events=(event,), requeue_after=0.0
    )


def fail(view: View, status: Status, reason: Reason, message: str, cause: Cause | None = None) -> Plan:
    """Failed. `status` has the attempt closed already."""
    status = stopped_clock(view, status)
    status = replace(
        status,
        phase=str(Phase.FAILED),
        completion_time=rfc3339(view.now),
        root_cause=cause or status.root_cause,
    )
    status = conditioned(view, status, ConditionType.RUNNING, False, reason, message)
    status = conditioned(view, status, ConditionType.FAILED, True, reason, message)
    event = EventNote(reason=str(reason), message=message, warning=True, action="Fail")
    return Plan(
        status=status, directives=exit_all(view, 1, "the run has failed"), events=(event,), requeue_after=0.0
    )


def finished(view: View) -> Plan | None:
    """After the end: agents exit, pods stay for their logs, what does not end is deleted, and the TTL runs.

    The status is never written again (but for `cleanup`, when the run is deleted: plan/cleanup.py).
    """
    if not view.status.finished:
        return None
    failed = view.status.is_true(ConditionType.FAILED)
    ended = parse(view.status.completion_time)
    if ended is None:
        ended = max((parse(c.last_transition_time) or 0.0 for c in view.status.conditions), default=0.0)
    soonest = Soonest(view.now)
    expiry = expires_at(view.spec, ended)
    if expiry is not None and soonest.passed(expiry):
        return Plan(delete_run=True)
    return Plan(
        delete_pods=_lingering(view, ended, soonest),
        directives=exit_all(
            view, 1 if failed else 0, "the run has failed" if failed else "the run is complete"
        ),
        requeue_after=soonest.seconds,
    )


def _lingering(view: View, ended: float, soonest: Soonest) -> tuple[DeletePod, ...]:
    """Pods that never ran, and pods that run on though they were told to exit."""
    alive = [p for p in view.observed.pods if p.phase not in ("Succeeded", "Failed") and not p.deleting]
    if not alive:
        return ()
    overdue = soonest.passed(ended + LINGER_SECONDS)
    return tuple(
        DeletePod(name=p.name, uid=p.uid, why="the run has ended")
        for p in alive
        if overdue or p.phase == "Pending"
    )
