"""Python environments beside ./dev's own, for programs whose packages do not go with it: one for each locks/NAME.txt."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.filelock import locked
from devcluster.images import locks, uv
from devcluster.paths import cache_root
from devcluster.progress import step


def environment(name: str, *, options: Sequence[str] = (), seconds: float = 1800) -> Path:
    """The folder of the environment with the packages of locks/NAME.txt; its interpreter is `bin/python`.

    Made when it is first asked for, by one process at a time, and kept in the cache under the hash of what it is made
    of, so that checkouts with the same lock share it. `options` go to `uv pip install`. Packages are hard links into
    uv's cache: torch in the same version as ./dev's takes no room of its own.
    Raises DevclusterError with what uv said, or when there is no such lock.
    """
    lock = locks.path(name)
    if not lock.is_file():
        raise DevclusterError(f"there is no {lock.name} in locks/: ./dev lock makes it from pyproject.toml")
    folder = cache_root() / f"venv-{name}-{_key(lock, options)}"
    complete = folder / ".complete"
    if complete.exists():
        return folder
    with locked(cache_root() / f"venv-{name}.lock", f"making the environment {name!r}", seconds=seconds):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            with step(f"making the Python environment of locks/{lock.name} (once; it may have to download)"):
                _make(folder, lock, options, seconds)
            complete.touch()
    return folder


def _key(lock: Path, options: Sequence[str]) -> str:
    made_of = [lock.read_text(), sys.version, sys.base_prefix, *options]
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]


def _make(folder: Path, lock: Path, options: Sequence[str], seconds: float) -> None:
    shared = ("--quiet", "--cache-dir", cache_root() / "uv-cache")
    python = folder / "bin" / "python"
    try:
        uv.run("venv", *shared, "--python", sys.executable, folder, seconds=60)
        uv.run(
            "pip", "install", *shared, "--link-mode", "hardlink", "--require-hashes", "--python", python,
            *options, "-r", lock, seconds=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise DevclusterError(
            f"installing locks/{lock.name} took more than {error.timeout:.0f} s; what was downloaded is kept: try again"
        ) from None
