"""Messages between a worker and its uploader: JSON objects, one a line (docs/architecture.md section 4)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from trainyard_api.checkpoints import Record
from trainyard_api.serde import decode, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Worker to uploader: a shard lies at `path`. Rank 0's carries the head of the commit record."""

    attempt: int
    step: int
    rank: int
    world: int
    path: str
    size: int
    """Bytes."""
    record: Record | None = None
    """Without seq and shards: the uploader knows those."""

    def line(self) -> bytes:
        return to_line({"op": "staged", **encode(self)})

    @classmethod
    def from_message(cls, data: dict[str, Any]) -> Staged:
        """Raises ValueError that names the field."""
        return decode(cls, {k: v for k, v in data.items() if k != "op"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Uploader to worker and subscribers: what became of a staged shard."""

    op: str
    """"uploaded": shard and descriptor are in the bucket (ranks other than 0 hear only this).
    "committed": the record is in the log. "dropped": given up, and the staged file deleted."""
    attempt: int
    step: int
    rank: int = 0
    seq: int = 0
    uri: str = ""
    """Of the commit record."""
    time: float = 0.0
    """Unix seconds of the commit."""
    seconds: float = 0.0
    """From the moment the shard was handed over to this."""
    size: int = 0
    """Bytes: committed: of all shards; uploaded: of this one."""
    stall_seconds: float = 0.0
    """committed: how long rank 0's training stood still for it."""
    reason: str = ""
    """dropped: why. committed: what it was made for (`Record.reason`)."""
    code: int = 1
    """dropped: the exit code of contract.ExitCode that fits, 1 if none does."""

    def line(self) -> bytes:
        return to_line(encode(self))

    @classmethod
    def from_message(cls, data: dict[str, Any]) -> Outcome:
        """Raises ValueError that names the field."""
        return decode(cls, data)


def to_line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes) -> dict[str, Any]:
    """Raises ValueError unless it is an object with an `op`."""
    data = json.loads(line)
    if not isinstance(data, dict) or not isinstance(data.get("op"), str):
        raise ValueError("not an object with an op")  # noqa: TRY004 - one error for all malformed messages
    return data
