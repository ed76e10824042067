"""The table of phases: each looks at the run and decides, or leaves it to the next.

A plan that raises `status.attempt` does nothing else: the attempt is persisted before anything of it exists
(docs/architecture.md part 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trainyard_api.contract import OPERATOR_NAME, ConditionType, Phase, Reason
from trainyard_api.v1alpha1 import Cause, Status
from trainyard_operator.plan import attempts, directives, status
from trainyard_operator.plan.cleanup import being_deleted, guarded
from trainyard_operator.plan.deadlines import Soonest, look_again, overdue
from trainyard_operator.plan.endings import completed, fail, finished
from trainyard_operator.plan.failures import Finding, findings, root_cause, still_waiting
from trainyard_operator.plan.model import CreatePod, DeletePod, EventNote, Plan
from trainyard_operator.plan.names import pod_name
from trainyard_operator.plan.pods import desired_pod
from trainyard_operator.plan.restarts import Verdict, judge
from trainyard_operator.plan.suspend import is_suspended, resumed_message, suspended
from trainyard_operator.plan.texts import clean, listed
from trainyard_operator.plan.times import parse, within
from trainyard_operator.plan.view import View, entry_of


def not_ours(view: View) -> Plan | None:
    """Somebody else manages the run: nothing of it is touched, and its agents are told nothing."""
    return Plan() if view.spec.managed_by != OPERATOR_NAME else None


def expired(view: View) -> Plan | None:
    """activeDeadlineSeconds has passed."""
    if view.attempt < 1 or not overdue(view):
        return None
    message = f"the run was active for {view.active_seconds:.0f} s; spec.activeDeadlineSeconds is " + str(
        view.spec.active_deadline_seconds
    )
    return fail(view, attempts.closed(view, end=view.now), Reason.DEADLINE_EXCEEDED, message)


def not_begun(view: View) -> Plan | None:
    """The first attempt, or the first after a suspend, is written down before anything of it exists."""
    if view.attempt < 1:
        message = f"waiting for {view.spec.nodes.desired} pods to be created"
        begun = attempts.opened(
            view, view.status, phase=Phase.PENDING, reason=Reason.CREATED, message=message
        )
        event = None
    elif is_suspended(view):
        message = resumed_message(view)
        begun = attempts.opened(
            view, view.status, phase=Phase.PENDING, reason=Reason.RESUMED, message=message
        )
        event = EventNote(reason=str(Reason.RESUMED), message=message.capitalize(), action="Resume")
    else:
        return None
    if view.status.condition(ConditionType.SUSPENDED) is not None:
        begun = attempts.conditioned(
            view, begun, ConditionType.SUSPENDED, False, Reason.RESUMED, "spec.suspend is false"
        )
    return Plan(status=begun, events=(event,) if event else (), requeue_after=0.0)


def failed(view: View) -> Plan | None:
    """The attempt is over: the next one is written down, or the run fails."""
    found = findings(view)
    if not found or still_waiting(view, found) > 0:
        return None
    root = root_cause(view, found)
    end = within(root.time, parse(view.entry.start_time) or 0.0, view.now)
    ended = attempts.closed(view, end=end, cause=root.cause)
    entry = entry_of(ended, view.attempt) or view.entry
    verdict = judge(view.status, view.spec.restart_policy, entry, root.cause, charged=root.charged)
    ended = replace(ended, restarts=verdict.restarts, root_cause=root.cause)
    if verdict.give_up is not None:
        message = f"{_story(view, root)}; not tried again: {verdict.why}"
        return fail(view, ended, verdict.give_up, message, root.cause)
    return _next_attempt(view, ended, root, verdict)


def going_on(view: View) -> Plan:
    """An attempt that is neither over nor stopped: complete the gang, let it run, say how it is."""
    soonest = Soonest(view.now)
    runs = view.started or directives.may_run(view)
    if runs and not view.started:
        view = replace(view, run_time=view.now)
    new = status.refreshed(view)
    look_again(view, soonest)
    wait = still_waiting(view, findings(view))
    if wait > 0:
        soonest.passed(view.now + wait)
    write = new != view.status and (
        status.urgent(view.status, new)
        or soonest.passed(view.observed.status_written + view.settings.status_interval)
    )
    creates = () if view.started else _missing(view)
    return Plan(
        status=new if write else None,
        delete_pods=_unwanted(view),
        create_pods=creates,
        directives=directives.run_all(view) if runs else directives.hold_all(view, _why_hold(new)),
        events=(status.transition_events(view, new) if write else ()) + _created_event(view, creates),
        requeue_after=soonest.seconds,
    )


def _next_attempt(view: View, ended: Status, root: Finding, verdict: Verdict) -> Plan:
    """Attempt n+1 is written down. What it needs is done by the next plan, from what was persisted."""
    number = view.attempt + 1
    when = f"in {verdict.delay:g} s" if verdict.delay > 0 else "at once"
    message = f"{_story(view, root)}; attempt {number} starts {when}"
    reason = Reason.BACK_OFF if verdict.delay > 0 else Reason.RESTARTING
    begun = attempts.opened(
        view, ended, phase=Phase.RESTARTING, reason=reason, message=message, delay=verdict.delay
    )
    event = EventNote(reason=root.cause.reason, message=clean(message), warning=True, action="Restart")
    return Plan(status=begun, events=(event,), requeue_after=0.0)


def _why_hold(new: Status) -> str:
    """For the agent's log."""
    running = new.condition(ConditionType.RUNNING)
    return running.reason if running is not None else ""


def _story(view: View, root: Finding) -> str:
    """What happened, where, and what it said."""
    cause = root.cause
    code = "" if cause.exit_code is None else f" ({_ending(cause.exit_code)})"
    where = [
        f"rank {cause.rank}" if cause.rank is not None else "",
        f"pod {cause.pod}" if cause.pod else _member(cause),
    ]
    where.append(f"node {cause.node}" if cause.node else "")
    place = ", ".join(part for part in where if part)
    said = ": ".join(part for part in (cause.exception, cause.message) if part)
    text = f"Attempt {view.attempt} failed: {cause.reason}{code}"
    return clean(text + (f" on {place}" if place else "") + (f": {said}" if said else ""), 800)


def _member(cause: Cause) -> str:
    return f"member {cause.node_index}" if cause.node_index is not None else ""


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _missing(view: View) -> tuple[CreatePod, ...]:
    """Pods to create: for places without a pod, and instead of older pods that cannot take part any more.

    A pod of this very attempt that went bad is not replaced here: its name is used up, the attempt failed.
    """
    refused = {r.pod for r in view.observed.refusals if r.retry_at > view.now}
    wanted = [
        slot.index
        for slot in view.gang.slots
        if slot.unusable and (slot.pod is None or slot.pod.created_in != view.attempt)
    ]
    return tuple(
        CreatePod(name=name, body=desired_pod(view.run, index, view.settings))
        for index in wanted
        if (name := pod_name(view.run.name, index, view.attempt)) not in refused
    )


def _unwanted(view: View) -> tuple[DeletePod, ...]:
    """Pods to delete: no members, or (before the gang runs) members of older make that are replaced.

    With the pod's own grace period: the agent of a lost node may be alive, and saves what it can. Nobody
    waits for it, and the fence of the commit log keeps it from writing.
    """
    doomed = [(pod, "it is no member of the current attempt") for pod in view.gang.surplus]
    if not view.started:
        doomed += [
            (slot.pod, f"it is replaced: {slot.state.name.lower()}")
            for slot in view.gang.slots
            if slot.pod is not None and slot.unusable and slot.pod.created_in != view.attempt
        ]
    return tuple(DeletePod(name=pod.name, uid=pod.uid, why=why) for pod, why in doomed if not pod.deleting)


def _created_event(view: View, creates: tuple[CreatePod, ...]) -> tuple[EventNote, ...]:
    """One Event for all pods of a round; none for what is only tried again."""
    if not creates or view.observed.refusals:
        return ()
    what = f"pod{'s' if len(creates) != 1 else ''} {listed([c.name for c in creates])}"
    message = f"Creating {what} for attempt {view.attempt}"
    return (EventNote(reason=str(Reason.POD_CREATED), message=message, action="Create"),)


PHASES: tuple[Callable[[View], Plan | None], ...] = (
    not_ours,
    being_deleted,
    guarded,
    finished,
    completed,
    expired,
    suspended,
    not_begun,
    failed,
    going_on,
)
"""In this order; the last one always decides."""
