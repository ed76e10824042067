"""What each agent is to do: HOLD until the whole gang can run, RUN from then on, EXIT at the end."""

from __future__ import annotations

from collections.abc import Mapping

from trainyard_api.contract import master_port
from trainyard_api.protocol import Action, Directive
from trainyard_operator.plan.membership import State
from trainyard_operator.plan.times import parse
from trainyard_operator.plan.view import View

CLOCK_STEP = 0.001
"""Seconds; the status holds times in microseconds, rounded."""


def may_run(view: View) -> bool:
    """Whether the gang can be told to run now: all up and warm, and the back-off has passed.

    Each must have spoken since the attempt was decided. The HOLD of a new attempt makes a live agent speak at
    once; one that died together with the one before is found out here instead of costing another attempt.
    """
    decided = (parse(view.entry.start_time) or 0.0) - CLOCK_STEP
    return view.now >= not_before(view) and all(
        slot.state is State.UP
        and slot.member is not None
        and slot.member.beat.ready
        and slot.member.received >= decided
        for slot in view.gang.slots
    )


def not_before(view: View) -> float:
    """End of the back-off, Unix seconds."""
    return parse(view.status.not_before) or 0.0


def run_all(view: View) -> Mapping[str, Directive] | None:
    """RUN for every member. None (leave them as they are) when the address of member 0 is not known.

    Members that were lost are named too: until the next attempt is persisted, this one is the truth.
    """
    first = view.gang.slots[0]
    address = (first.pod.ip if first.pod else "") or (first.beat.pod_ip if first.beat else "")
    if not address:
        return None
    return {
        slot.pod.uid: Directive(
            action=Action.RUN,
            attempt=view.attempt,
            node_rank=slot.index,
            nodes=len(view.gang.slots),
            procs_per_node=view.spec.processes_per_node,
            master_addr=address,
            master_port=master_port(view.attempt),
        )
        for slot in view.gang.slots
        if slot.pod is not None
    }


def hold_all(view: View, reason: str) -> Mapping[str, Directive]:
    """HOLD for every member that can still take part. The others are not named: they are told to EXIT."""
    return {
        slot.pod.uid: Directive(action=Action.HOLD, attempt=view.attempt, reason=reason)
        for slot in view.gang.slots
        if slot.pod is not None and not slot.unusable
    }


def exit_all(view: View, code: int, reason: str) -> Mapping[str, Directive]:
    """EXIT for every pod of the run."""
    told = Directive(action=Action.EXIT, attempt=max(view.attempt, 0), exit_code=code, reason=reason)
    return {pod.uid: told for pod in view.observed.pods}
