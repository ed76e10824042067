"""The local file of a shard, on its way from the worker's memory to the uploader."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainyard_api.checkpoints import shard_key
from trainyard_api.contract import Env

_PREFIX = "trainyard-staging-"
_YOUNG_SECONDS = 60


@dataclass(frozen=True, slots=True)
class StagedFile:
    path: Path
    size: int
    """Bytes."""
    sha256: str


class HashingFile:
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
            hashing = HashingFile(file)
            torch.save(dict(payload), hashing)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return StagedFile(path, hashing.size, hashing.sha256.hexdigest())


class StagingFolder:
    """`$TRAINYARD_RUNTIME_DIR/staging` in a pod; elsewhere a temporary folder, deleted by `close`.

    A process that is killed leaves its temporary folder; the next one here sweeps it. Who lives holds a lock.
    """

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        runtime = env.get(Env.RUNTIME_DIR)
        self._lock: int | None = None
        if runtime:
            self.path = Path(runtime) / "staging"
            self.path.mkdir(parents=True, exist_ok=True)
            return
        _sweep_temporary()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = _lock(self.path)

    def close(self) -> None:
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder; None if another process does, or it is not ours."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep_temporary() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # Between mkdtemp and flock a folder looks abandoned: a young one is left alone.
        with contextlib.suppress(OSError):
            if folder.stat().st_uid != os.getuid() or time.time() - folder.stat().st_ctime < _YOUNG_SECONDS:
                continue
            if (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
