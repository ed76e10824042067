"""Everything that happens because time has passed: limits of the user, and when to look again."""

from __future__ import annotations

from trainyard_api.v1alpha1 import Spec
from trainyard_operator.plan.directives import not_before
from trainyard_operator.plan.model import PodView
from trainyard_operator.plan.progress import has_stepped
from trainyard_operator.plan.view import View

SETUP_SECONDS = 4.0
"""How long the creation of a container may take before the kubelet's Events are asked why, and between two looks."""
LEAST_WAIT = 0.01
"""Seconds: a moment that is due by rounding alone is not looked at in a tight loop."""


def being_created(pod: PodView) -> bool:
    """Whether the pod has a node, but its container is not made yet and the pod's status does not say why."""
    return pod.phase == "Pending" and bool(pod.node) and pod.waiting_reason in ("", "ContainerCreating")


class Soonest:
    """Collects moments; the nearest one that has not passed is when to look again."""

    def __init__(self, now: float) -> None:
        self._now = now
        self.seconds: float | None = None
        """Until the nearest moment; None if there is none."""

    def passed(self, moment: float) -> bool:
        """Whether `moment` (Unix seconds) has come; if not, it is one to look again at."""
        if moment <= self._now:
            return True
        wait = max(LEAST_WAIT, moment - self._now)
        self.seconds = wait if self.seconds is None else min(self.seconds, wait)
        return False


def expires_at(spec: Spec, ended: float) -> float | None:
    """When a run that ended at `ended` is deleted; None: never."""
    return None if spec.ttl_seconds_after_finished is None else ended + spec.ttl_seconds_after_finished


def overdue(view: View) -> bool:
    """Whether the run was active for longer than activeDeadlineSeconds. Suspended time does not count."""
    limit = view.spec.active_deadline_seconds
    return limit is not None and bool(view.status.active_since) and view.active_seconds >= limit


def look_again(view: View, soonest: Soonest) -> None:
    """The moments of a run that goes on at which something is due though nothing may happen before."""
    limit = view.spec.active_deadline_seconds
    if limit is not None:
        soonest.passed(view.now + limit - view.active_seconds)
    for slot in view.gang.slots:
        if slot.silent_at is not None:
            soonest.passed(slot.silent_at)
        if slot.pod is not None and being_created(slot.pod):
            due = slot.pod.creation_time + SETUP_SECONDS
            soonest.passed(due if due > view.now else view.now + SETUP_SECONDS)
    for refusal in view.observed.refusals:
        soonest.passed(refusal.retry_at)
    if view.run_time is None:
        soonest.passed(not_before(view))
    elif not has_stepped(view):
        soonest.passed(view.run_time + view.spec.restart_policy.start_timeout_seconds)
