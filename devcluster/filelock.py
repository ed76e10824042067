"""A lock between processes, held by the kernel, so that a killed holder can never leave it locked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.progress import say


def _open_current(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _is_current(fd: int, path: Path) -> bool:
    """Whether the locked file is still the one at the path: its last holder may have removed it meanwhile."""
    try:
        return os.fstat(fd).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path, why: str, *, seconds: float = 600, remove: bool = False) -> Iterator[None]:
    """Hold the lock; `remove` deletes the file before it is released, so that nothing stays behind."""
    begin, told = time.monotonic(), False
    while True:
        fd = _open_current(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(fd, path):
                break
        except BlockingIOError:
            if time.monotonic() - begin > seconds:
                os.close(fd)
                raise DevclusterError(f"{why}: another process has held {path} for {seconds:.0f} s") from None
            if not told:
                say(f"waiting for another process that holds {path} ({why})")
                told = True
        os.close(fd)
        time.sleep(0.1)
    try:
        yield
    finally:
        if remove:
            path.unlink(missing_ok=True)
        os.close(fd)
