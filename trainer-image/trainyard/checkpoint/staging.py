"""The local file of a shard, on its way from the worker's memory to the uploader.

    data/step-.../a.../shard-....safetensors   staged; after the commit the copy on this node, if there is to be one
    free/*.safetensors                         files of saves that are over, to be written again

A name that ends in ".tmp" is a file that is being written. Its writer holds a lock on it; without one it is swept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainyard.checkpoint.format.shardfile import Layout, Wanted
from trainyard.checkpoint.mapped import Identity, MappedFile, identity
from trainyard.checkpoint.plan import Assigned
from trainyard_api.checkpoints import shard_key
from trainyard_api.contract import Env

log = logging.getLogger("trainyard.checkpoint")

_PREFIX = "trainyard-staging-"
_HIDDEN = f".{_PREFIX}"
_YOUNG_SECONDS = 60
_MAPPED = 3
"""Files that stay mapped: one that is uploaded, one that is the copy on this node, one that is free."""
FREE = "free"


@dataclass(frozen=True, slots=True)
class StagedFile:
    path: Path
    size: int
    """Bytes."""


def stage(
    pieces: Sequence[Assigned], trees: dict[str, Any], folder: StagingFolder, *, step: int, attempt: int, rank: int, world: int,
    layout: Layout | None = None,
) -> StagedFile:  # fmt: skip
    """Write a shard: one copy of its tensors into a mapped file, which appears under its name when it is whole. When this
    returns, the tensors may change again. `layout`: of these very pieces, if it is known already.

    No fsync: when the node goes, its staging folder goes with it. Raises OSError, with nothing left behind.
    """
    if layout is None:
        layout = layout_of(pieces)
    beginning = layout.beginning(trees)
    start, size = len(beginning), len(beginning) + layout.bytes
    path = folder.path / shard_key(step, attempt, rank, world)
    with folder.writing(path, size) as file:
        file.write(beginning)
        file.copy([(start + layout.places[p.name][0], p.local) for p in pieces])
    return StagedFile(path, size)


def layout_of(pieces: Sequence[Assigned]) -> Layout:
    return Layout(Wanted(name=p.name, dtype=p.local.dtype, box=p.box, whole=p.whole) for p in pieces)


class StagingFolder:
    """`$TRAINYARD_RUNTIME_DIR/staging` in a pod. Elsewhere a folder of its own, deleted by `close`: hidden in `target`, a
    directory on the file system where the checkpoints go, or a temporary one.

    A process that is killed leaves its folder; the next one here sweeps it. Who lives holds a lock. One thread uses it.
    """

    def __init__(self, env: Mapping[str, str] = os.environ, *, target: Path | None = None) -> None:
        """Raises OSError."""
        runtime = env.get(Env.RUNTIME_DIR)
        self._lock: int | None = None
        self._mapped: dict[Identity, MappedFile] = {}
        """The one that was used last is the last."""
        self._preparing: threading.Thread | None = None
        if runtime:
            self.path = Path(runtime) / "staging"
            self.path.mkdir(parents=True, exist_ok=True)
            _sweep_unfinished(self.path)
            return
        if target is None:
            parent, prefix = Path(tempfile.gettempdir()), _PREFIX
        else:
            parent, prefix = target, _HIDDEN
            parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._lock = _lock(self.path)

    def prepare(self, size: int) -> None:
        """See to it, in the background, that there is a free file for a shard of `size` bytes that is quick to write. To be
        called before the first save, and when a save is committed. Never raises."""
        self._settle()
        self._preparing = threading.Thread(target=self._prepare, args=(size,), name="prepare", daemon=True)
        self._preparing.start()

    @contextlib.contextmanager
    def writing(self, path: Path, size: int) -> Iterator[MappedFile]:
        """A file of `size` bytes with any content, which appears as `path` if nothing is raised. Raises OSError."""
        self._settle()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        file = self._take(temporary)
        try:
            file.resize(size)
            yield file
            temporary.replace(path)
        except BaseException as error:
            self._drop(file)
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    error.errno,
                    f"no room for a shard of {size} bytes in the staging folder: {error.strerror}",
                    str(self.path),
                ) from error
            raise
        file.unlock()

    def close(self) -> None:
        self._settle()
        for file in list(self._mapped.values()):
            self._drop(file)
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def _settle(self) -> None:
        """Wait for what `prepare` does: as much work as it would be to do it here."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    def _prepare(self, size: int) -> None:
        temporary = self.path / FREE / f"{uuid.uuid4().hex}.tmp"
        file: MappedFile | None = None
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            file = self._take(temporary)
            file.resize(size)
            file.populate(size)
            temporary.replace(temporary.with_suffix(".safetensors"))
            file.unlock()
        except (OSError, RuntimeError) as error:
            # RuntimeError: the interpreter is about to end.
            log.debug("no staging file was prepared: %s", error)
            if file is not None:
                self._drop(file)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _take(self, temporary: Path) -> MappedFile:
        """A free file, or else a new one; locked, and called `temporary` from now on."""
        for gone in [file for file in self._mapped.values() if not file.links]:
            self._drop(gone)
        for path, known in self._free():
            file: MappedFile | None = self._mapped.get(known)
            try:
                if file is None:
                    file = MappedFile(path, create=False)
                else:
                    file.lock()
                path.replace(temporary)
            except OSError:  # another rank of this node was quicker
                if file is not None and known not in self._mapped:
                    file.close()
                continue
            if file.links > 1:
                # It has another name, where it is a checkpoint.
                self._drop(file)
                temporary.unlink()
                continue
            return self._keep(file)
        return self._keep(MappedFile(temporary, create=True))

    def _free(self) -> list[tuple[Path, Identity]]:
        """Those that are mapped already come first."""
        found = []
        for path in (self.path / FREE).glob("*.safetensors"):
            with contextlib.suppress(OSError):
                found.append((path, identity(path)))
        return sorted(found, key=lambda f: (f[1] not in self._mapped, f[0]))

    def _keep(self, file: MappedFile) -> MappedFile:
        self._mapped.pop(file.identity, None)
        self._mapped[file.identity] = file
        while len(self._mapped) > _MAPPED:
            self._drop(next(iter(self._mapped.values())))
        return file

    def _drop(self, file: MappedFile) -> None:
        self._mapped.pop(file.identity, None)
        file.close()


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


def _sweep(parent: Path, prefix: str) -> None:
    """Delete the folders in `parent` whose owners are dead."""
    for folder in parent.glob(f"{prefix}*"):
        # Between mkdtemp and flock a folder looks abandoned: a young one is left alone.
        with contextlib.suppress(OSError):
            if folder.stat().st_uid != os.getuid() or time.time() - folder.stat().st_ctime < _YOUNG_SECONDS:
                continue
            if (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _sweep_unfinished(root: Path) -> None:
    """Delete the shards that a dead worker of this pod had not finished."""
    for path in [*root.glob("data/*/*/*.tmp"), *root.glob(f"{FREE}/*.tmp")]:
        with contextlib.suppress(OSError):
            file = MappedFile(path, create=False)
            path.unlink()
            file.close()
