"""Where the images' cache keeps its parts, and the lock that makes one process at a time change them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from devcluster.filelock import locked
from devcluster.paths import cache_root

REPOSITORY = Path(__file__).resolve().parents[2]


def home() -> Path:
    """The images' part of the cache."""
    return cache_root() / "images"


def bases() -> Path:
    """One OCI layout for each base image."""
    return home() / "bases"


def layouts() -> Path:
    """One OCI layout for each image that was built."""
    return home() / "layouts"


def blobs() -> Path:
    """Every blob of every layout, by its SHA-256; layouts hold hard links: a layer is on the disk once."""
    return home() / "blobs"


def wheels() -> Path:
    """One folder of wheels for each lock and Python version."""
    return home() / "wheels"


def storage() -> Path:
    """buildah's own store: the unpacked layers, and its cache of build steps."""
    return home() / "storage"


@contextlib.contextmanager
def exclusive(why: str) -> Iterator[None]:
    """Be the only one who changes the cache. What an interrupted holder left half done is removed first."""
    with locked(cache_root() / "images.lock", why, seconds=1800):
        shutil.rmtree(_scratch(), ignore_errors=True)
        yield


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder on the cache's file system for things that are not whole yet; only within `exclusive`."""
    _scratch().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
        yield Path(folder)


def _scratch() -> Path:
    return home() / "unfinished"
