"""Decisions. Pure: no I/O, no clock, no randomness, no logging; imports only `trainyard_api`."""

from __future__ import annotations

from trainyard_operator.plan.model import Observed, Plan, PlanSettings
from trainyard_operator.plan.phases import PHASES
from trainyard_operator.plan.view import View

__all__ = ["Observed", "Plan", "PlanSettings", "plan"]


def plan(observed: Observed, settings: PlanSettings) -> Plan:
    """What to do about a run now: the first phase that applies decides. Never raises on what others wrote."""
    view = View.of(observed, settings)
    return next(decided for phase in PHASES if (decided := phase(view)) is not None)
