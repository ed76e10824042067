"""The status of a run while an attempt goes on, and when it is worth a write."""

from __future__ import annotations

from dataclasses import replace

from trainyard_api.contract import ConditionType, Phase, Reason
from trainyard_api.protocol import AgentPhase
from trainyard_api.v1alpha1 import Status
from trainyard_operator.plan.attempts import conditioned, nodes_status, with_entry
from trainyard_operator.plan.membership import Slot, State
from trainyard_operator.plan.model import EventNote
from trainyard_operator.plan.progress import has_stepped, status_progress, with_progress
from trainyard_operator.plan.texts import clean
from trainyard_operator.plan.times import micro
from trainyard_operator.plan.view import View, entry_of
from trainyard_operator.plan.waiting import TROUBLES, why_waiting


def refreshed(view: View) -> Status:
    """The status as it should read now. The attempt neither begins nor ends here."""
    status = replace(view.status, observed_generation=view.run.generation)
    entry = view.entry
    if view.run_time is not None:
        created = sum(s.pod is not None and s.pod.created_in == view.attempt for s in view.gang.slots)
        entry = replace(
            entry,
            run_time=entry.run_time or micro(view.run_time),
            pods_created=entry.pods_created if entry.pods_created is not None else created,
        )
        status = status_progress(view, replace(status, not_before=""))
        entry = with_progress(view, entry)
    status = with_entry(status, entry)
    ready = _ready(view)
    status = replace(status, nodes=nodes_status(len(view.gang.slots), ready))
    return _phased(view, status, ready)


def urgent(old: Status, new: Status) -> bool:
    """Whether the difference is a transition. Mere progress, and other words for the same, can wait."""
    return _transitions(old) != _transitions(new)


def transition_events(view: View, new: Status) -> tuple[EventNote, ...]:
    """One Event for each transition between the persisted status and the new one."""
    events = []
    before, after = view.status.condition(ConditionType.RUNNING), new.condition(ConditionType.RUNNING)
    if after is not None and after.reason in TROUBLES and (before is None or before.reason != after.reason):
        events.append(EventNote(reason=after.reason, message=after.message, warning=True, action="Start"))
    entry = entry_of(new, view.attempt)
    if entry is not None and entry.passed_over and not view.entry.passed_over:
        message = clean(f"Attempt {view.attempt} starts from step {entry.resumed_step}: {entry.passed_over}")
        reason = str(Reason.CHECKPOINT_PASSED_OVER)
        events.append(EventNote(reason=reason, message=message, warning=True, action="Resume"))
    if entry is not None and entry.first_step_time and not view.entry.first_step_time:
        where = f"from step {entry.resumed_step}" if entry.resumed_step else "from the beginning"
        nodes = f"{len(view.gang.slots)} node{'s' if len(view.gang.slots) != 1 else ''}"
        if view.restart:
            took = f" in {entry.recovery_seconds:.1f} s" if entry.recovery_seconds is not None else ""
            lost = f", {entry.lost_steps} steps lost" if entry.lost_steps is not None else ""
            message = f"Attempt {view.attempt} resumed {where}{took}{lost}, on {nodes}"
            events.append(EventNote(reason=str(Reason.RECOVERED), message=message, action="Recover"))
        else:
            message = f"Attempt {view.attempt} trains {where} on {nodes}"
            events.append(EventNote(reason=str(Reason.STARTED), message=message, action="Start"))
    return tuple(events)


def _phased(view: View, status: Status, ready: int) -> Status:
    if view.started and has_stepped(view):
        size = len(view.gang.slots)
        message = f"attempt {view.attempt} trains on {size} node{'s' if size != 1 else ''}{_warning(view)}"
        status = replace(status, phase=str(Phase.RUNNING))
        return conditioned(view, status, ConditionType.RUNNING, True, Reason.TRAINING, message)
    waiting = why_waiting(view, ready)
    first = Phase.STARTING if view.started else Phase.PENDING
    phase = Phase.RESTARTING if view.restart else first
    status = replace(status, phase=str(phase))
    return conditioned(view, status, ConditionType.RUNNING, False, waiting.reason, waiting.message)


def _ready(view: View) -> int:
    """Nodes that are alive and warm, or training.

    After a restart of the operator nobody was heard yet: that is no news, and the last known number stays
    until every agent had the time to speak.
    """
    ready = sum(_is_ready(slot) for slot in view.gang.slots)
    settling = view.now - view.observed.listening_since < view.settings.agent_ttl
    unheard = any(s.member is None and s.state is State.BOOTING for s in view.gang.slots)
    known = view.status.nodes
    if settling and unheard and known.desired == len(view.gang.slots):
        return min(max(ready, known.ready), len(view.gang.slots))
    return ready


def _is_ready(slot: Slot) -> bool:
    if slot.state is State.DONE:
        return True
    beat = slot.beat
    return slot.state is State.UP and beat is not None and (beat.ready or beat.phase != AgentPhase.IDLE)


def _warning(view: View) -> str:
    """The first thing that an agent wants people to see."""
    for slot in view.gang.slots:
        if slot.beat is not None and slot.beat.warnings:
            return f"; {slot.pod.name if slot.pod else 'an agent'} warns: {clean(slot.beat.warnings[0], 300)}"
    return ""


def _transitions(status: Status) -> Status:
    """The status without what may be late."""
    return replace(
        status,
        step=None,
        total_steps=None,
        epoch=None,
        loss=None,
        samples_per_second=None,
        progress="",
        checkpoint=None,
        attempts=[
            replace(e, last_step=None, resumed_step=None, resumed_from="", lost_steps=None)
            for e in status.attempts
        ],
        conditions=[replace(c, message="") for c in status.conditions],
    )
