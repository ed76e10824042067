"""Why a gang is not running yet, in one reason and one sentence that says what to do."""

from __future__ import annotations

from dataclasses import dataclass

from trainyard_api.contract import Reason
from trainyard_operator.plan.directives import not_before
from trainyard_operator.plan.membership import Slot, State
from trainyard_operator.plan.model import PodView
from trainyard_operator.plan.names import pod_name
from trainyard_operator.plan.texts import clean, listed
from trainyard_operator.plan.times import rfc3339
from trainyard_operator.plan.view import View

IMAGE_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
"""Waiting reasons of a container (kubelet, pkg/kubelet/images/types.go)."""
CONFIG_REASONS = frozenset(
    ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PreCreateHookError")
)
"""Waiting reasons of a container (kubelet, pkg/kubelet/kuberuntime/kuberuntime_container.go)."""
SETUP_ADVICE = "create the ConfigMap, Secret or volume that it names, or correct the spec"
TROUBLES = (
    Reason.CREATE_FAILED,
    Reason.IMAGE_PULL_FAILED,
    Reason.CONTAINER_CONFIG_ERROR,
    Reason.UNSCHEDULABLE,
)
"""Somebody has to do something: shown with a Warning Event when it begins."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the gang waits for."""

    reason: Reason
    message: str

    @property
    def trouble(self) -> bool:
        return self.reason in TROUBLES


def why_waiting(view: View, ready: int) -> Waiting:
    """The most useful of all reasons; `ready` is the number of ready nodes to show."""
    found = _trouble(view)
    if found is not None:
        return found
    size = len(view.gang.slots)
    if view.started:
        return _forming(
            view, f"attempt {view.attempt}: {size} nodes were told to run; waiting for the first step"
        )
    pending = [s for s in view.gang.slots if s.pod is None or s.unusable or s.pod.phase != "Running"]
    if pending:
        running = size - len(pending)
        return Waiting(
            Reason.PODS_PENDING, f"{running}/{size} pods are running; waiting for {_pods(pending)}"
        )
    if view.now < not_before(view):
        return Waiting(
            Reason.BACK_OFF,
            f"attempt {view.attempt} waits until {rfc3339(not_before(view))}: the one before made no progress",
        )
    text = f"attempt {view.attempt}: {ready}/{size} nodes are ready"
    return _forming(view, text + _complaint(view))


def _forming(view: View, message: str) -> Waiting:
    return Waiting(Reason.RESTARTING if view.restart else Reason.GANG_FORMING, message)


def _trouble(view: View) -> Waiting | None:
    if view.started:
        return None
    missing = {pod_name(view.run.name, s.index, view.attempt) for s in view.gang.slots if s.unusable}
    for refusal in view.observed.refusals:
        if refusal.pod not in missing:
            continue
        message = (
            f"pod {refusal.pod} cannot be created: {clean(refusal.message, 600)}; it is tried again by itself"
        )
        return Waiting(Reason.CREATE_FAILED, message)
    pods = [s.pod for s in view.gang.slots if s.pod is not None and not s.unusable]
    for pod in pods:
        if pod.waiting_reason in IMAGE_REASONS:
            return _lasting(view, Reason.IMAGE_PULL_FAILED, pod, "check spec.image and spec.imagePullSecrets")
    for pod in pods:
        if pod.waiting_reason in CONFIG_REASONS:
            advice = "create the Secret or ConfigMap that it names, or correct the spec"
            return _lasting(view, Reason.CONTAINER_CONFIG_ERROR, pod, advice)
    for pod in pods:
        if pod.setup_trouble:
            return _lasting(view, Reason.CONTAINER_CONFIG_ERROR, pod, SETUP_ADVICE)
    for pod in pods:
        if pod.unschedulable:
            message = (
                f"pod {pod.name}: {clean(pod.unschedulable, 600)}; free capacity or correct spec.resources"
            )
            return Waiting(Reason.UNSCHEDULABLE, message)
    return None


def _lasting(view: View, reason: Reason, pod: PodView, advice: str) -> Waiting:
    """A complaint of the kubelet. It words the same trouble anew at each try: what was said first is kept."""
    start = f"pod {pod.name}: "
    before = view.status.condition("Running")
    known = before is not None and before.reason == reason and before.message.startswith(start)
    if before is not None and known and "Back-off" not in before.message:
        return Waiting(reason, before.message)
    told = pod.setup_trouble or f"{pod.waiting_reason}: {pod.waiting_message or 'no details'}"
    return Waiting(reason, f"{start}{clean(told, 600)}; {advice}")


def _pods(slots: list[Slot]) -> str:
    names = [s.pod.name for s in slots if s.pod is not None and not s.unusable]
    if not names:
        return f"{len(slots)} to be created"
    creating = next((s.pod for s in slots if s.pod and s.pod.waiting_reason == "ContainerCreating"), None)
    where = (
        f" (its container is being created on {creating.node}: image pull or volume mount; "
        f"`kubectl describe pod {creating.name}` tells)"
        if creating is not None and creating.node
        else ""
    )
    return listed(names) + where


def _complaint(view: View) -> str:
    """What the agents that are not ready say, if they say anything."""
    for slot in view.gang.slots:
        if slot.state is State.UP and slot.beat is not None and not slot.beat.ready and slot.beat.warnings:
            return f"; {slot.pod.name if slot.pod else 'an agent'}: {clean(slot.beat.warnings[0], 300)}"
    return ""
