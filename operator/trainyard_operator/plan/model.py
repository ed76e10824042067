"""What goes into `plan()` and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainyard_api.protocol import Beat, Directive
from trainyard_api.v1alpha1 import Status, TrainingRun


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """What a decision needs to know of one pod that this run controls (ownerReference by UID)."""

    name: str
    uid: str
    index: int
    created_in: int
    """Attempt in which it was created (label)."""
    phase: str
    """Pending, Running, Succeeded, Failed, Unknown."""
    ip: str = ""
    node: str = ""
    deleting: bool = False
    creation_time: float = 0.0
    """Unix seconds."""
    started_at: float = 0.0
    """Unix seconds at which the trainer container started; 0 before that."""
    reason: str = ""
    """status.reason (Evicted, ...), or DisruptionTarget's reason."""
    message: str = ""
    unschedulable: str = ""
    """Message of PodScheduled=False, reason Unschedulable."""
    waiting_reason: str = ""
    """ErrImagePull, ImagePullBackOff, InvalidImageName, CreateContainerConfigError, ..."""
    waiting_message: str = ""
    setup_trouble: str = ""
    """What the kubelet's newest Warning Event says of a container that is still being created (a volume that
    cannot be mounted, a sandbox that cannot be made): the pod's own status does not tell."""
    exit_code: int | None = None
    """Of the terminated trainer container."""
    terminated_reason: str = ""
    """OOMKilled, Error, Completed."""
    termination_message: str = ""
    """What the agent wrote: JSON {"attempt", "outcome", ...}, or anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """The newest word of one agent, as the coordinator heard it."""

    beat: Beat
    received: float
    """Unix seconds by the operator's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The API server's last word on a pod that we asked for: quota, Pod Security, admission, a taken name."""

    pod: str
    message: str
    retry_at: float
    """Unix seconds; not asked for again before."""
    hopeless: bool = False
    """No pod will be taken any more: the namespace is being deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything a decision may depend on."""

    run: TrainingRun
    pods: tuple[PodView, ...]
    members: Mapping[str, Member]
    """By pod UID."""
    now: float
    """Unix seconds."""
    listening_since: float = 0.0
    """Since when this operator process can hear beats: nobody is called silent for longer than that."""
    refusals: tuple[Refusal, ...] = ()
    """Creates of this run's pods that were refused and did not succeed since."""
    status_written: float = 0.0
    """When this process last wrote the status of this run (Unix seconds); 0 if it never did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What the administrator decides; the same for all runs."""

    coordinator_url: str
    coordinator_ca: str
    agent_ttl: float = 10.0
    """Seconds without a beat after which an agent counts as lost."""
    coalesce: float = 0.15
    """Seconds to wait for more failure reports after the first."""
    status_interval: float = 10.0
    """Least seconds between two status writes that only carry progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletePod:
    name: str
    uid: str
    why: str
    grace_seconds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatePod:
    name: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventNote:
    """One Event about the run; posted once per transition."""

    reason: str
    message: str
    """At most 1024 characters, control characters stripped."""
    warning: bool = False
    action: str = "Reconcile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do, in the order of docs/architecture.md 1.4."""

    status: Status | None = None
    """The whole new status, or None when nothing is to be written."""
    delete_pods: tuple[DeletePod, ...] = ()
    create_pods: tuple[CreatePod, ...] = ()
    directives: Mapping[str, Directive] | None = None
    """By pod UID. Agents of this run that are not named are told to EXIT. None: leave all as they are."""
    events: tuple[EventNote, ...] = ()
    delete_run: bool = False
    """TTL has passed."""
    finalizers: tuple[str, ...] | None = None
    """The run's finalizers from now on, all of them. A plan that changes them does nothing else."""
    requeue_after: float | None = None
    """Seconds until it must be looked at again though nothing happens; None: not needed."""
