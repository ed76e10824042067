"""What the agents' beats say about training, made fit for the status."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from trainyard_api.protocol import AgentPhase, Beat, Progress, Resumed
from trainyard_api.v1alpha1 import AttemptStatus, CheckpointStatus, Status
from trainyard_operator.plan.texts import clean, finite, whole
from trainyard_operator.plan.times import micro, parse, rfc3339, within
from trainyard_operator.plan.view import View

MAX_URI = 2048
"""Characters of an address in the status."""
MAX_REASON = 64
"""Characters of what a checkpoint was made for."""


def beats_of_attempt(view: View) -> Iterator[Beat]:
    """The members' beats about the current attempt, node rank 0 first."""
    for slot in view.gang.slots:
        if slot.beat is not None and slot.beat.attempt == view.attempt:
            yield slot.beat


def resumed(view: View) -> Resumed | None:
    """Where the current attempt started from, by the first member that knows."""
    said = (beat.resumed for beat in beats_of_attempt(view))
    return next((r for r in said if r is not None and r.attempt == view.attempt), None)


def has_stepped(view: View) -> bool:
    """Whether this attempt took a step. A step needs every rank, so that each member had started then."""
    return bool(view.entry.first_step_time) or any(_stepped(view, b) for b in beats_of_attempt(view))


def newest(view: View) -> Progress | None:
    """The newest progress of the current attempt."""
    stepped = has_stepped(view)
    known = [
        beat.progress
        for beat in beats_of_attempt(view)
        if beat.progress is not None and (stepped or _counts(view, beat, beat.progress))
    ]
    return max(known, key=lambda p: p.step, default=None)


def with_progress(view: View, entry: AttemptStatus) -> AttemptStatus:
    """The attempt's line of history with what the beats add to it."""
    entry = replace(entry, last_step=_last_step(view, entry))
    start = resumed(view)
    if start is not None:
        step = whole(start.step) or 0
        before = view.previous
        lost = max(0, before.last_step - step) if before and before.last_step is not None else None
        entry = replace(
            entry,
            resumed_step=step,
            resumed_from=clean(start.uri, MAX_URI),
            passed_over=clean(start.fell_back),
            lost_steps=lost,
        )
    if not entry.first_step_time and has_stepped(view):
        first = within(start.first_step_time if start else None, view.run_time or view.now, view.now)
        ended = parse(view.previous.end_time) if view.previous and view.restart else None
        took = round(max(0.0, first - ended), 3) if ended is not None else None
        entry = replace(entry, first_step_time=micro(first), recovery_seconds=took)
    return entry


def status_progress(view: View, status: Status) -> Status:
    """The status with step, loss, throughput and checkpoint as last reported; what nobody reported stays."""
    status = replace(status, checkpoint=_checkpoint(view))
    now = newest(view)
    if now is None:
        return status
    step = whole(now.step) or 0
    total = whole(now.total_steps) or status.total_steps
    return replace(
        status,
        step=step,
        total_steps=total,
        epoch=whole(now.epoch),
        loss=finite(now.loss),
        samples_per_second=_speed(now.samples_per_second),
        progress=f"{min(100, 100 * step // total)}%" if total else status.progress,
    )


def _speed(number: float | None) -> float | None:
    value = finite(number)
    return value if value is None or value >= 0 else None


def _duration(seconds: float | None) -> float | None:
    value = _speed(seconds)
    return None if value is None else round(value, 3)


def _stepped(view: View, beat: Beat) -> bool:
    if beat.phase == AgentPhase.RUNNING:
        return True
    said = beat.resumed
    return said is not None and said.attempt == view.attempt and said.first_step_time is not None


def _counts(view: View, beat: Beat, progress: Progress) -> bool:
    """Before the first step is known: whether this is of the attempt, not a left-over of the one before.

    A step beyond the best of all earlier attempts cannot be a left-over.
    """
    return beat.phase == AgentPhase.SUCCEEDED or progress.step > view.status.best_step


def _last_step(view: View, entry: AttemptStatus) -> int | None:
    now = newest(view)
    step = whole(now.step) if now else None
    known = [s for s in (step, entry.last_step) if s is not None]
    return max(known, default=None)


def _checkpoint(view: View) -> CheckpointStatus | None:
    """The newest commit that anyone knows of; numbers of the log only grow."""
    before = view.status.checkpoint
    said = [slot.beat.checkpoint for slot in view.gang.slots if slot.beat and slot.beat.checkpoint]
    best = max(said, key=lambda c: c.seq, default=None)
    if best is None or (before is not None and (whole(best.seq) or 0) <= before.seq):
        return before
    return CheckpointStatus(
        step=whole(best.step) or 0,
        seq=whole(best.seq) or 0,
        uri=clean(best.uri, MAX_URI),
        time=rfc3339(within(best.time, 0.0, view.now)),
        reason=clean(best.reason, MAX_REASON),
        bytes=whole(best.bytes),
        upload_seconds=_duration(best.upload_seconds),
        stall_seconds=_duration(best.stall_seconds),
    )
