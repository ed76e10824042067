"""What can go wrong with checkpoints, and the exit code with which the process says so."""

from __future__ import annotations

from trainyard_api.checkpoints import Fenced
from trainyard_api.contract import ExitCode


class CheckpointError(Exception):
    """The text is one line that a user can act on."""

    exit_code: int = 1
    """1: a restart may help."""


class CheckpointConfigError(CheckpointError):
    """A restart cannot help: somebody has to change something first."""

    exit_code = int(ExitCode.CONFIG)


class CheckpointMismatch(CheckpointConfigError):
    """The checkpoint is sound, but of another model or optimizer."""


class NoUsableCheckpoint(CheckpointConfigError):
    """There are commits, and none of them can be read. Never answered by a silent start from zero."""


class CommitFailed(CheckpointError):
    """The last checkpoint of a run could not be committed."""


class StoreError(CheckpointError):
    """A bucket or directory did not do what it was asked."""


class NotFound(StoreError):
    """There is no such key."""


class StoreConfigError(StoreError):
    """No such bucket, refused credentials, no permission."""

    exit_code = int(ExitCode.CONFIG)


class StoreUnavailable(StoreError):
    """No connection, time-out, 5xx, throttling: worth another try.

    `slow_down`: the server said that there are too many requests (503 SlowDown, 429), so that the next try should wait
    longer; `retry_after`: the seconds that it named.
    """

    def __init__(self, text: str, *, slow_down: bool = False, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.slow_down = slow_down
        self.retry_after = retry_after


class ShardInvalid(CheckpointError):
    """A shard is missing, is not what its commit says, or holds more than tensors and primitives."""


def exit_code(error: BaseException) -> int:
    """Exit code of a worker that ends with `error`."""
    if isinstance(error, Fenced):
        return int(ExitCode.FENCED)
    return error.exit_code if isinstance(error, CheckpointError) else 1


_BY_NAME: dict[str, type[Exception]] = {
    cls.__name__: cls
    for cls in (
        CheckpointError, CheckpointConfigError, CheckpointMismatch, NoUsableCheckpoint, CommitFailed, StoreError,
        NotFound, StoreConfigError, StoreUnavailable, ShardInvalid, Fenced,
    )
}  # fmt: skip


def to_wire(error: Exception) -> dict[str, str]:
    """For the other ranks, which must fail alike."""
    name = type(error).__name__
    return {"kind": name if name in _BY_NAME else "CheckpointError", "message": str(error)}


def from_wire(data: dict[str, str]) -> Exception:
    return _BY_NAME[data["kind"]](data["message"])
