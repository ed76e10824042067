"""The local file of a shard, on its way from the worker's memory to the uploader."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainyard_api.checkpoints import shard_key
from trainyard_api.contract import Env


@dataclass(frozen=True, slots=True)
class StagedFile:
    path: Path
    size: int
    """Bytes."""
    sha256: str


class _HashingFile:
    """A file that is only appended to, and hashed on the way. torch's zip writer needs no more than `write`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.sha256.update(data)
        length = memoryview(data).nbytes
        self.size += length
        return length

    def flush(self) -> None:
        self._file.flush()


def write_shard(
    payload: Mapping[str, Any], root: Path, *, step: int, attempt: int, rank: int, world: int
) -> StagedFile:
    """Write a shard; it appears under its name when it is whole. Raises OSError.

    No fsync: when the node goes, its staging folder goes with it.
    """
    import torch

    path = root / shard_key(step, attempt, rank, world)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            hashing = _HashingFile(file)
            torch.save(dict(payload), hashing)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return StagedFile(path, hashing.size, hashing.sha256.hexdigest())


class StagingFolder:
    """`$TRAINYARD_RUNTIME_DIR/staging` in a pod; elsewhere a temporary folder, deleted by `close`."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        runtime = env.get(Env.RUNTIME_DIR)
        self._owned = not runtime
        self.path = (
            Path(runtime) / "staging" if runtime else Path(tempfile.mkdtemp(prefix="trainyard-staging-"))
        )
        self.path.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        if self._owned:
            shutil.rmtree(self.path, ignore_errors=True)
