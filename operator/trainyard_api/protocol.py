"""Messages between an agent and the coordinator: `POST /v1/runs/<uid>/beat` (design parts 3 and 4).

The agent sends a `Beat` at least every `BEAT_SECONDS` and at once when something changed; the answer is a
`Directive`. The call is a long poll: while the directive's `revision` equals `Beat.seen`, the coordinator
holds the answer for up to `Beat.wait` seconds. A beat is the proof of life; there is no other.

The bearer token is a projected service-account token of audience `contract.TOKEN_AUDIENCE`. TokenReview
returns the pod's UID with it: a beat whose `pod_uid` is another's is refused (403).

Status codes: 200 directive; 400 malformed beat; 401 token refused; 403 not this pod, or not a pod of this
run; 410 the run or the pod is gone: stop the workers and exit; 426 contract too new; 503 the coordinator
cannot tell yet (caches not synced, not the leader): go on with what you do and ask again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from trainyard_api.contract import CONTRACT
from trainyard_api.serde import decode, encode

BEAT_SECONDS = 2.0
"""Longest time between two beats of a live agent, and the longest long poll."""
MAX_BODY = 64 * 1024
"""Bytes. A larger beat is refused unread (413)."""


class AgentPhase(StrEnum):
    """What the agent does, about `Beat.attempt`."""

    IDLE = "idle"  # no workers; ready for an assignment if `Beat.ready`
    STARTING = "starting"  # workers forked; no step reported yet
    RUNNING = "running"  # at least one step was taken in this attempt
    STOPPING = "stopping"  # killing the workers of an older attempt
    SUCCEEDED = "succeeded"  # all local workers exited with 0
    FAILED = "failed"  # a local worker failed; see `Beat.failure`
    DRAINING = "draining"  # the pod was asked to stop (SIGTERM)


class Action(StrEnum):
    """What the coordinator asks of the agent."""

    HOLD = "hold"  # no workers may run; older attempts are killed; stay ready for `attempt`
    RUN = "run"  # run `attempt` with this assignment; a no-op if it runs already
    EXIT = "exit"  # kill what runs and exit with `exit_code`: the run is over, or you are not part of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far training is. Taken from the newest step of local rank 0."""

    step: int = 0
    """Optimizer steps since the start of the run (not of the attempt)."""
    total_steps: int | None = None
    epoch: int = 0
    loss: float | None = None
    samples_per_second: float | None = None
    """Over all ranks."""
    time: float = 0.0
    """Unix seconds of that step's end, by the pod's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where this attempt started from."""

    attempt: int
    step: int
    """0: from the beginning."""
    uri: str = ""
    """The commit it was loaded from; empty if from the beginning."""
    fell_back: str = ""
    """Why newer commits were passed over, empty if none was."""
    first_step_time: float | None = None
    """Unix seconds of the end of the first new step of this attempt; None until it was taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The newest commit that this pod knows of."""

    step: int
    seq: int
    uri: str
    time: float
    """Unix seconds."""
    reason: str = ""
    """What it was made for (`checkpoints.Record.reason`); empty if not known, as are those below if None."""
    bytes: int | None = None
    """Of all shards."""
    upload_seconds: float | None = None
    """From the first byte to the commit."""
    stall_seconds: float | None = None
    """For which training stood still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why the local workers of `attempt` ended."""

    attempt: int
    rank: int | None = None
    local_rank: int | None = None
    exit_code: int | None = None
    """>= 0 for an exit, < 0 for a signal (-9 is SIGKILL), None if the launcher itself failed."""
    exception: str = ""
    """Type name of the Python exception, empty if there was none."""
    message: str = ""
    """Last line of the exception or of the launcher's error, at most 1024 characters, no control characters."""
    time: float = 0.0
    """Unix seconds at which the worker failed, by the pod's clock."""
    collateral: bool = False
    """True when it looks like the echo of another rank's death (peer closed connection)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What an agent says of itself."""

    pod_name: str
    pod_uid: str
    incarnation: str
    """Random per agent process: two agents that claim one pod are seen."""
    node_index: int
    pod_ip: str = ""
    contract: int = CONTRACT
    attempt: int = 0
    """The attempt that `phase` is about; 0 before the first."""
    phase: AgentPhase = AgentPhase.IDLE
    ready: bool = False
    """The zygote is warm: workers can be forked at once."""
    seen: str = ""
    """`revision` of the last directive that was obeyed."""
    wait: float = 0.0
    """Longest time in seconds that the answer may be held back; at most BEAT_SECONDS is honoured."""
    progress: Progress | None = None
    resumed: Resumed | None = None
    checkpoint: Checkpoint | None = None
    failure: Failure | None = None
    blocked: str = ""
    """Why no attempt can succeed on this pod until somebody changes something (no such bucket, refused credentials),
    known before any worker has started: the run fails with it at once. One line; empty when nothing is known."""
    warnings: list[str] = field(default_factory=list)
    """At most 4 short lines that people should see (an upload that fails, a clock that is off)."""

    def to_json(self) -> dict[str, Any]:
        """The wire form: camelCase keys, no nulls."""
        return encode(self)  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Any) -> Beat:
        """Raises ValueError that names the field when `data` is not a beat."""
        return decode(cls, data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """What an agent is to do now. Equal directives have equal revisions."""

    action: Action
    attempt: int = 0
    node_rank: int = 0
    nodes: int = 0
    procs_per_node: int = 0
    master_addr: str = ""
    """IP of the pod with node rank 0 (never a DNS name: `facts/elastic.md` 1.2)."""
    master_port: int = 0
    exit_code: int = 0
    reason: str = ""

    @property
    def revision(self) -> str:
        """Identity of this directive; equal content gives an equal string, on any operator process."""
        return (
            f"{self.attempt}/{self.action}/{self.node_rank}/{self.nodes}x{self.procs_per_node}"
            f"/{self.master_addr}:{self.master_port}/{self.exit_code}"
        )

    def to_json(self) -> dict[str, Any]:
        """The wire form, with the revision added."""
        return {**encode(self), "revision": self.revision}

    @classmethod
    def from_json(cls, data: Any) -> Directive:
        """Raises ValueError that names the field when `data` is not a directive."""
        if isinstance(data, dict):
            data = {k: v for k, v in data.items() if k != "revision"}
        return decode(cls, data)
