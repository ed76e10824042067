"""Files that are whole or not there: written in a folder beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainyard.export.errors import ExportError


def local_path(path: str | os.PathLike[str], argument: str = "file_path") -> Path:
    """Raises ExportError for a URL or a folder."""
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise ExportError(f"{argument}: {text!r} is a URL; export to a local file and copy that")
    if Path(text).is_dir():
        raise ExportError(f"{argument}: {text!r} is a folder; name a file in it")
    return Path(text)


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path of the same name to write to. What is beside it in the end (a sidecar) moves with it.

    The sidecars are moved first, and an old file goes before any of them: whoever reads at any moment, or after a
    crash, finds the old files, the new files, or no `path`, but never the one with the other's sidecar.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        written = sorted(folder.iterdir())
        for file in written:
            _flush(file)
        if len(written) > 1:
            path.unlink(missing_ok=True)
        for file in sorted(written, key=lambda each: each.name == path.name):
            file.replace(path.parent / file.name)
        _flush(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
