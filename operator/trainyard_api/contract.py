"""Names shared by the operator, the agent and the trainer: labels, environment, exit codes, reasons.

One place, so that two sides can never spell a name differently.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

GROUP = "trainyard.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "TrainingRun"
PLURAL = "trainingruns"

CONTRACT = 1
"""Version of the agent protocol. The operator refuses an agent that speaks a newer one than it knows."""

OPERATOR_NAME = f"{GROUP}/operator"
"""Value of `spec.managedBy` (and its default) that makes this operator act on a run."""

FINALIZER = f"{GROUP}/checkpoints"
"""Holds a run with `deletionPolicy: Delete` until its checkpoints are deleted, or cannot be."""

# ---- labels and annotations of children -------------------------------------------------------------
LABEL_RUN = f"{GROUP}/run"
"""Name of the run; for people and selectors. Ownership is decided by ownerReferences, never by this."""
LABEL_RUN_UID = f"{GROUP}/run-uid"
LABEL_NODE_INDEX = f"{GROUP}/node-index"
LABEL_ATTEMPT = f"{GROUP}/created-in-attempt"
"""The attempt in which the pod was created. A pod serves later attempts too: healthy pods stay."""
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_NAME = "app.kubernetes.io/name"
LABEL_COMPONENT = "app.kubernetes.io/component"
MANAGED_BY = "trainyard"

# ---- pod layout -------------------------------------------------------------------------------------
CONTAINER = "trainer"
CLEANUP_CONTAINER = "cleanup"
"""Of the pod that deletes a run's checkpoints."""
TOKEN_AUDIENCE = f"{GROUP}/coordinator"
TOKEN_DIR = "/var/run/trainyard/token"  # noqa: S105 - a path
TOKEN_FILE = f"{TOKEN_DIR}/token"
RUNTIME_DIR = "/trainyard"
"""Writable emptyDir of the pod: sockets, error files, staged checkpoints."""
SCRIPT_DIR = "/trainyard-script"
TERMINATION_LOG = "/dev/termination-log"
MASTER_PORT_BASE = 29500
MASTER_PORT_SPAN = 1000
"""Attempt n meets at port BASE + n % SPAN, so that two attempts never share a rendezvous port."""


def master_port(attempt: int) -> int:
    """TCP port of the rendezvous of `attempt`."""
    return MASTER_PORT_BASE + attempt % MASTER_PORT_SPAN


class Env(StrEnum):
    """Environment that the operator gives the agent, and (marked W) that the agent gives each worker."""

    RUN_NAME = "TRAINYARD_RUN_NAME"  # W
    RUN_NAMESPACE = "TRAINYARD_RUN_NAMESPACE"  # W
    RUN_UID = "TRAINYARD_RUN_UID"  # W
    POD_NAME = "TRAINYARD_POD_NAME"
    POD_UID = "TRAINYARD_POD_UID"
    POD_IP = "TRAINYARD_POD_IP"
    NODE_INDEX = "TRAINYARD_NODE_INDEX"
    PROCS_PER_NODE = "TRAINYARD_PROCS_PER_NODE"
    COORDINATOR_URL = "TRAINYARD_COORDINATOR_URL"
    COORDINATOR_CA = "TRAINYARD_COORDINATOR_CA"
    """PEM of the CA, inline: it is public, and a file would be one more object to keep."""
    TOKEN_FILE = "TRAINYARD_TOKEN_FILE"  # noqa: S105 - a name
    COMMAND = "TRAINYARD_COMMAND"
    """JSON list: what every process runs: [script.py, arg...] or ["-m", module, arg...]."""
    PRELOAD = "TRAINYARD_PRELOAD"
    """Comma-separated modules that the zygote imports beside torch."""
    GRACE_SECONDS = "TRAINYARD_GRACE_SECONDS"
    RUNTIME_DIR = "TRAINYARD_RUNTIME_DIR"  # W
    ATTEMPT = "TRAINYARD_ATTEMPT"  # W
    AGENT_SOCKET = "TRAINYARD_AGENT_SOCKET"  # W
    UPLOADER_SOCKET = "TRAINYARD_UPLOADER_SOCKET"  # W
    CHECKPOINT_URI = "TRAINYARD_CHECKPOINT_URI"  # W
    CHECKPOINT_ENDPOINT = "TRAINYARD_CHECKPOINT_ENDPOINT"  # W
    CHECKPOINT_REGION = "TRAINYARD_CHECKPOINT_REGION"  # W
    CHECKPOINT_EVERY_STEPS = "TRAINYARD_CHECKPOINT_EVERY_STEPS"  # W
    CHECKPOINT_EVERY_SECONDS = "TRAINYARD_CHECKPOINT_EVERY_SECONDS"  # W
    CHECKPOINT_AUTO = "TRAINYARD_CHECKPOINT_AUTO"  # W
    """"1": the interval is chosen from the measured cost of a save and rate of failures."""
    CHECKPOINT_ON_EXCEPTION = "TRAINYARD_CHECKPOINT_ON_EXCEPTION"  # W
    """"1": save when the program raises, where the state is sound."""
    CHECKPOINT_KEEP = "TRAINYARD_CHECKPOINT_KEEP"  # W
    CHECKPOINT_KEEP_BEST = "TRAINYARD_CHECKPOINT_KEEP_BEST"  # W
    """`metric:min|max:count`."""
    CHECKPOINT_RESUME = "TRAINYARD_CHECKPOINT_RESUME"  # W
    """never, auto, required, or a step."""
    CHECKPOINT_LOCAL = "TRAINYARD_CHECKPOINT_LOCAL"  # W
    """"1": the newest checkpoint stays on the nodes too; a restart takes what it finds there."""
    CHECKPOINT_COPIES = "TRAINYARD_CHECKPOINT_COPIES"  # W
    """On how many other nodes a copy of each node's shards is kept; 0 for none."""
    DETERMINISM = "TRAINYARD_DETERMINISM"  # W
    """"elastic": the same weights, bit for bit, at any number of processes."""
    VIRTUAL_RANKS = "TRAINYARD_VIRTUAL_RANKS"  # W
    """Of determinism elastic: in how many parts a step is always computed."""


RESERVED_ENV_PREFIXES = ("TRAINYARD_", "TORCHELASTIC_", "PET_")
RESERVED_ENV = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


class ExitCode(IntEnum):
    """Exit codes of a worker that mean more than "it failed"."""

    OK = 0
    CONFIG = 78
    """A restart cannot help (EX_CONFIG of sysexits.h): bad credentials, missing bucket, wrong shapes."""
    FENCED = 79
    """This process belongs to an older attempt. Never charged, never a failure of the run."""


class Phase(StrEnum):
    """`status.phase`: one word for people. Programs read the conditions."""

    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class ConditionType(StrEnum):
    """Types of `status.conditions`; the names of batch/v1 Job where they mean the same."""

    COMPLETE = "Complete"
    FAILED = "Failed"
    SUSPENDED = "Suspended"
    RUNNING = "Running"


class Reason(StrEnum):
    """Reasons of conditions and Events."""

    # Running
    CREATED = "Created"
    PODS_PENDING = "PodsPending"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_CONFIG_ERROR = "ContainerConfigError"
    CREATE_FAILED = "CreateFailed"
    GANG_FORMING = "GangForming"
    TRAINING = "Training"
    RESTARTING = "Restarting"
    BACK_OFF = "BackOff"
    # causes of a failed attempt
    WORKER_FAILED = "WorkerFailed"
    WORKER_KILLED = "WorkerKilled"
    OUT_OF_MEMORY = "OutOfMemory"
    POD_LOST = "PodLost"
    POD_FAILED = "PodFailed"
    EVICTED = "Evicted"
    AGENT_LOST = "AgentLost"
    START_TIMEOUT = "StartTimeout"
    CONFIGURATION = "ConfigurationError"
    # Failed
    RESTARTS_EXHAUSTED = "RestartsExhausted"
    NO_PROGRESS = "NoProgress"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    # Complete, Suspended
    SUCCEEDED = "Succeeded"
    SUSPENDED = "Suspended"
    SUSPENDING = "Suspending"
    RESUMED = "Resumed"
    NOT_SUSPENDED = "NotSuspended"
    # Events only
    STARTED = "Started"
    RECOVERED = "Recovered"
    CHECKPOINT_PASSED_OVER = "CheckpointPassedOver"
    DELETING_CHECKPOINTS = "DeletingCheckpoints"
    CHECKPOINTS_DELETED = "CheckpointsDeleted"
    CHECKPOINTS_LEFT_BEHIND = "CheckpointsLeftBehind"
    POD_CREATED = "PodCreated"


class FailureClass(StrEnum):
    """Which budget a failure is charged to (design part 5)."""

    USER = "user"
    INFRASTRUCTURE = "infrastructure"
    CONFIGURATION = "configuration"
    """Not retried."""
