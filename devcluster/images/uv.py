"""Finds uv, which resolves and locks; it is the one host program that these modules need beside Debian's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.paths import cache_root


def find() -> Path:
    """The program: ./dev's own, or one beside this Python, or one on PATH."""
    for candidate in (cache_root() / "uv" / "bin" / "uv", Path(sys.executable).with_name("uv")):
        if os.access(candidate, os.X_OK):
            return candidate
    if found := shutil.which("uv"):
        return Path(found)
    raise DevclusterError(
        "uv is missing: run this by ./dev, which installs the uv of locks/uv.txt, or put uv on PATH"
    )


def run(*arguments: object, stdin: str | None = None, seconds: float = 600) -> str:
    """Run uv and return what it printed. Raises DevclusterError with what it said."""
    result = subprocess.run(
        [str(find()), *map(str, arguments)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        env=os.environ | {"UV_NO_PROGRESS": "1"},
        timeout=seconds,
        check=False,
    )
    if result.returncode != 0:
        raise DevclusterError(
            f"uv {' '.join(map(str, arguments[:2]))} failed: {result.stderr.strip()[-2000:]}"
        )
    return result.stdout
