"""`TrainingRun` of trainyard.dev/v1alpha1: spec and status as frozen dataclasses.

The schema of record is `crds/trainyard.dev_trainingruns.yaml`; a test holds the two together (fields and
defaults). Pod-shaped fragments that we only pass on (affinity, tolerations, valueFrom, volume sources) stay
dicts: the CRD has closed schemas for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainyard_api.contract import OPERATOR_NAME, ConditionType
from trainyard_api.serde import decode, encode

# ---- spec -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """How many pods. `max` must equal `min` until elastic runs come (a CEL rule says so)."""

    min: int
    max: int | None = None

    @property
    def desired(self) -> int:
        return self.min if self.max is None else self.max


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigMapKey:
    name: str
    key: str = "train.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A Python file from a ConfigMap of the run's namespace."""

    config_map: ConfigMapKey


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvVar:
    name: str
    value: str | None = None
    value_from: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    requests: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Volume and mount in one. Exactly one source is set."""

    name: str
    mount_path: str
    sub_path: str | None = None
    read_only: bool = False
    empty_dir: dict[str, Any] | None = None
    config_map: dict[str, Any] | None = None
    secret: dict[str, Any] | None = None
    persistent_volume_claim: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRef:
    """A name in the run's own namespace. There is no namespace field in any reference, ever."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInterval:
    """Save when either has passed. With nothing set, at every epoch's end only."""

    steps: int | None = None
    seconds: int | None = None
    auto: bool = False
    """Chosen from the measured cost of a save and the rate of failures; not together with the two above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepBest:
    """Checkpoints to keep beside the newest: those with the best value of a metric that the program logs."""

    metric: str
    mode: str = "min"
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTier:
    """The newest checkpoint on the nodes too. `medium` and `size_limit` are those of the pod's runtime volume."""

    enabled: bool = True
    copies: int = 0
    """On how many other nodes a copy of each node's part is kept."""
    medium: str | None = None
    size_limit: int | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSpec:
    uri: str
    endpoint: str | None = None
    region: str | None = None
    interval: CheckpointInterval = CheckpointInterval()
    on_exception: bool = False
    keep: int = 3
    keep_best: KeepBest | None = None
    resume: int | str = "auto"
    """never, auto, required, or a step."""
    local: LocalTier = LocalTier()
    deletion_policy: str = "Retain"
    """What becomes of the checkpoints when the run is deleted: Retain or Delete."""
    credentials_secret: LocalRef | None = None
    """Secret with keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if temporary)."""

    @property
    def deletes(self) -> bool:
        """Whether the checkpoints go with the run."""
        return self.deletion_policy == "Delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    max_restarts: int = 10
    """Restarts after failures of the program (exception, exit code, signal, OOM)."""
    max_infrastructure_restarts: int = 100
    """Restarts after lost pods, evictions, dead agents."""
    no_progress_limit: int = 3
    """Consecutive failed attempts without a new step beyond the last reached one, then Failed."""
    backoff_seconds: int = 1
    """First pause between attempts without progress; doubles. After progress there is no pause."""
    backoff_max_seconds: int = 60
    start_timeout_seconds: int = 600
    """Longest time from the gang being told to run to its first step, and for the pods to be up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    image: str
    nodes: Nodes
    image_pull_policy: str | None = None
    image_pull_secrets: list[LocalRef] = field(default_factory=list)
    processes_per_node: int = 1
    script: Script | None = None
    command: list[str] = field(default_factory=list)
    args: list[str] = field(default_factory=list)
    working_dir: str | None = None
    preload: list[str] = field(default_factory=list)
    env: list[EnvVar] = field(default_factory=list)
    env_from: list[dict[str, Any]] = field(default_factory=list)
    resources: Resources = Resources()
    volumes: list[Volume] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    affinity: dict[str, Any] | None = None
    priority_class_name: str | None = None
    service_account_name: str | None = None
    termination_grace_period_seconds: int = 30
    checkpoint: CheckpointSpec
    determinism: str | None = None
    """"elastic": the same weights, bit for bit, at any number of processes."""
    virtual_ranks: int | None = None
    """Of determinism elastic: in how many parts a step is always computed."""
    restart_policy: RestartPolicy = RestartPolicy()
    suspend: bool = False
    active_deadline_seconds: int | None = None
    ttl_seconds_after_finished: int | None = None
    managed_by: str = OPERATOR_NAME


# ---- status -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """metav1.Condition."""

    type: str
    status: str
    """"True", "False" or "Unknown"."""
    reason: str
    message: str = ""
    last_transition_time: str = ""
    observed_generation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why an attempt failed: the first failing rank and what it said."""

    reason: str
    failure_class: str = field(metadata={"key": "class"})
    message: str = ""
    rank: int | None = None
    node_index: int | None = None
    pod: str = ""
    node: str = ""
    exit_code: int | None = None
    """>= 0 exit code, < 0 minus the signal's number."""
    exception: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStatus:
    """One line of history. Times are RFC 3339 with microseconds (metav1.MicroTime)."""

    attempt: int
    start_time: str = ""
    """When the attempt was decided."""
    run_time: str = ""
    """When its gang was told to run."""
    first_step_time: str = ""
    end_time: str = ""
    resumed_step: int | None = None
    resumed_from: str = ""
    passed_over: str = ""
    """Newer checkpoints that could not be used, and why."""
    last_step: int | None = None
    """Newest step that was reported in this attempt."""
    lost_steps: int | None = None
    """Steps of the attempt before that this one has to take again."""
    recovery_seconds: float | None = None
    """From the failure of the attempt before to the first new step of this one."""
    pods_created: int | None = None
    """0: every pod was kept and restarted in place."""
    cause: Cause | None = None
    """Why it ended; none if it still runs, completed or was suspended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesStatus:
    desired: int = 0
    ready: int = 0
    """Pods whose agent is alive and warm, or training."""
    summary: str = ""
    """"2/2", for the printer column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointStatus:
    step: int
    seq: int
    uri: str
    time: str = ""
    reason: str = ""
    """What it was made for: steps, time, auto, epoch, stop, exception, end."""
    bytes: int | None = None
    """Of all its shards."""
    upload_seconds: float | None = None
    """From the first byte to the commit."""
    stall_seconds: float | None = None
    """For which training stood still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupStatus:
    """How far the deletion of the checkpoints is, of a run that is being deleted (`deletionPolicy: Delete`)."""

    start_time: str = ""
    """When the run was first seen to be deleted."""
    tries: int = 0
    """Cleanup pods that were decided on; the last one is the current try."""
    try_time: str = ""
    """When the current try begins; its limits count from here."""
    result: str = ""
    """Empty while it goes on; then Deleted or LeftBehind, and the finalizer is removed."""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    """Counters that survive suspend, resume and operator restarts."""

    user: int = 0
    infrastructure: int = 0
    without_progress: int = 0
    """Consecutive; back to 0 when an attempt passes the best step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    observed_generation: int = 0
    phase: str = ""
    attempt: int = 0
    """The fence of everything (design part 2). 0: nothing was started yet."""
    nodes: NodesStatus = NodesStatus()
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    loss: float | None = None
    samples_per_second: float | None = None
    progress: str = ""
    """"37%"."""
    best_step: int = 0
    """Highest step ever reached; progress is measured against it."""
    checkpoint: CheckpointStatus | None = None
    restarts: Restarts = Restarts()
    not_before: str = ""
    """Back-off: the gang of the current attempt is not told to run before this time."""
    root_cause: Cause | None = None
    """Of the newest failed attempt."""
    attempts: list[AttemptStatus] = field(default_factory=list)
    """The newest MAX_ATTEMPTS, oldest first; the last one is the current attempt."""
    start_time: str = ""
    active_seconds: int = 0
    """Seconds before `active_since` that the run was active, over all its active periods."""
    active_since: str = ""
    """Since when the run is active now (not suspended, not finished)."""
    completion_time: str = ""
    cleanup: CleanupStatus | None = None
    conditions: list[Condition] = field(default_factory=list)

    def condition(self, kind: ConditionType | str) -> Condition | None:
        return next((c for c in self.conditions if c.type == str(kind)), None)

    def is_true(self, kind: ConditionType | str) -> bool:
        found = self.condition(kind)
        return found is not None and found.status == "True"

    @property
    def finished(self) -> bool:
        """Terminal: Complete or Failed. Never undone."""
        return self.is_true(ConditionType.COMPLETE) or self.is_true(ConditionType.FAILED)

    def to_json(self) -> dict[str, Any]:
        return encode(self)  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Any) -> Status:
        return decode(cls, data or {})


MAX_ATTEMPTS = 10
"""Entries kept in `status.attempts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A run as read from the API."""

    name: str
    namespace: str
    uid: str
    generation: int
    resource_version: str
    creation_timestamp: str
    deleting: bool
    spec: Spec
    status: Status
    finalizers: tuple[str, ...] = ()

    @classmethod
    def from_object(cls, obj: dict[str, Any]) -> TrainingRun:
        """Raises ValueError (with the field's path) for an object that the schema should have refused."""
        meta = obj["metadata"]
        return cls(
            name=meta["name"],
            namespace=meta["namespace"],
            uid=meta["uid"],
            generation=meta.get("generation", 0),
            resource_version=meta.get("resourceVersion", ""),
            creation_timestamp=meta.get("creationTimestamp", ""),
            deleting="deletionTimestamp" in meta,
            spec=decode(Spec, obj.get("spec", {}), path="spec"),
            status=decode(Status, obj.get("status") or {}, path="status"),
            finalizers=tuple(meta.get("finalizers") or ()),
        )
