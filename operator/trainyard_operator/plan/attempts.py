"""Opening and closing attempts: how history, counters and clocks of the status move on."""

from __future__ import annotations

from dataclasses import replace

from trainyard_api.contract import ConditionType, Phase, Reason
from trainyard_api.v1alpha1 import MAX_ATTEMPTS, AttemptStatus, Cause, NodesStatus, Status
from trainyard_operator.plan.conditions import with_condition
from trainyard_operator.plan.progress import status_progress, with_progress
from trainyard_operator.plan.times import micro, parse, rfc3339
from trainyard_operator.plan.view import View


def closed(view: View, *, end: float, cause: Cause | None = None) -> Status:
    """The status with the current attempt's line of history ended at `end` (Unix seconds)."""
    status = status_progress(view, view.status)
    entry = view.entry
    if not entry.end_time:
        entry = replace(with_progress(view, entry), end_time=micro(end), cause=cause)
    return with_entry(status, entry)


def opened(
    view: View, status: Status, *, phase: Phase, reason: Reason, message: str, delay: float = 0.0
) -> Status:
    """The status that begins the attempt after `status.attempt`; `delay` in seconds from now."""
    attempt = max(status.attempt, 0) + 1
    size = view.spec.nodes.desired
    ready = min(status.nodes.ready, size) if phase is Phase.RESTARTING else 0
    status = replace(
        status,
        phase=str(phase),
        attempt=attempt,
        observed_generation=view.run.generation,
        nodes=nodes_status(size, ready),
        start_time=status.start_time or rfc3339(view.now),
        active_since=status.active_since or rfc3339(view.now),
        not_before=micro(view.now + delay) if delay > 0 else "",
        best_step=best_step(status),
    )
    status = with_entry(status, AttemptStatus(attempt=attempt, start_time=micro(view.now)))
    return conditioned(view, status, ConditionType.RUNNING, False, reason, message)


def stopped_clock(view: View, status: Status) -> Status:
    """The status of a run that is not active any more: its clock stands, nothing is ready or delayed."""
    return replace(
        status,
        observed_generation=view.run.generation,
        active_seconds=round(view.active_seconds),
        active_since="",
        not_before="",
        best_step=best_step(status),
        nodes=nodes_status(view.spec.nodes.desired, 0),
    )


def best_step(status: Status) -> int:
    """The highest step of all attempts; moved when an attempt ends, so that progress is measured against the
    best of the attempts *before*."""
    return max([status.best_step, *(e.last_step for e in status.attempts if e.last_step is not None)])


def nodes_status(desired: int, ready: int) -> NodesStatus:
    return NodesStatus(desired=desired, ready=ready, summary=f"{ready}/{desired}")


def with_entry(status: Status, entry: AttemptStatus) -> Status:
    """The status with one line of history replaced or added; the oldest ones go (MAX_ATTEMPTS)."""
    others = [e for e in status.attempts if e.attempt < entry.attempt]
    lines = sorted([*others, entry], key=lambda e: e.attempt)
    return replace(status, attempts=lines[-MAX_ATTEMPTS:])


def conditioned(  # noqa: PLR0917 - the parts of one condition
    view: View, status: Status, kind: ConditionType, value: bool, reason: Reason, message: str
) -> Status:
    """The status with one condition set."""
    conditions = with_condition(
        status.conditions, kind, value, reason, message, now=view.now, generation=view.run.generation
    )
    return replace(status, conditions=conditions)


def duration(view: View) -> float:
    """Seconds since the run was first started."""
    begun = parse(view.status.start_time)
    return max(0.0, view.now - begun) if begun is not None else 0.0
