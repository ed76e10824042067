"""Finds a Go toolchain, or fetches one from the Go module proxy.

Debian stable's Go is too old to build Kubernetes, and too old to fetch a newer toolchain by itself. The module proxy
serves every toolchain as a zip, though, and that needs nothing but this file. The checksums were taken from zips that
the Go checksum database vouches for.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import urllib.request
import zipfile
from pathlib import Path

from devcluster import debian
from devcluster.errors import DevclusterError
from devcluster.paths import cache_root
from devcluster.progress import step

OLDEST = (1, 25)
VERSION = "go1.26.8"
_ZIPS = {
    "x86_64": ("linux-amd64", "30c2b1bf7dcc88d3eb0a1364e47ddd9128edb3110a30e8a0ef61cd5856b31de7"),
    "aarch64": ("linux-arm64", "02b36b6787b3ac767668f630e2998df45a3b1f9ffee08d1bf3ef6487cd658d99"),
}


def version(go: str) -> str | None:
    """What this Go calls itself, such as go1.26.8, or None if it does not run."""
    try:
        out = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()


def new_enough(found: str | None) -> bool:
    """Whether a version can build every tool of this package."""
    if not found or not found.startswith("go1."):
        return False
    return (1, int(found.removeprefix("go1.").split(".")[0].split("rc")[0])) >= OLDEST


def find() -> tuple[str, str] | None:
    """A Go that is already on this machine and new enough, with its version."""
    for go in (shutil.which("go"), str(_fetched() / "bin" / "go"), "/usr/local/go/bin/go"):
        if go and Path(go).exists() and new_enough(found := version(go)):
            return go, str(found)
    return None


def ensure() -> tuple[str, str]:
    """A Go that is new enough, fetched when there is none."""
    if (found := find()) is None:
        _fetch()
        found = find()
    if found is None:
        raise DevclusterError(f"the Go toolchain fetched to {_fetched()} does not run")
    return found


def _fetched() -> Path:
    return cache_root() / "toolchain" / VERSION


def _fetch() -> None:
    if platform.machine() not in _ZIPS:
        raise DevclusterError(f"no Go toolchain is pinned for {platform.machine()}: install Go 1.25 or newer")
    name, digest = _ZIPS[platform.machine()]
    url = f"{_proxy()}/golang.org/toolchain/@v/v0.0.1-{VERSION}.{name}.zip"
    target = _fetched()
    target.parent.mkdir(parents=True, exist_ok=True)
    archive = target.with_suffix(".zip.partial")
    with step(
        f"fetching {VERSION} (70 MB) from the Go module proxy, because no Go of at least 1.25 is installed"
    ):
        # The scheme is the configured proxy's, and what comes is checked against the pin.
        with urllib.request.urlopen(url, timeout=60) as response, archive.open("wb") as file:  # noqa: S310
            shutil.copyfileobj(response, file)
        with archive.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                archive.unlink()
                raise DevclusterError(f"{url} is not the toolchain that is pinned: its checksum differs")
        _unpack(archive, target)
    archive.unlink()


def _proxy() -> str:
    """The first module proxy that Go itself would ask. Where no Go is at all, Debian's old one is installed to say it."""
    setting = os.environ.get("GOPROXY", "")
    if not setting:
        if shutil.which("go") is None:
            debian.ensure(["golang-go"], "its settings tell where to fetch a newer Go from")
        done = subprocess.run(
            ["go", "env", "GOPROXY"], capture_output=True, text=True, timeout=60, check=False
        )
        setting = done.stdout.strip()
    first = setting.replace("|", ",").split(",")[0].rstrip("/")
    if not first.startswith(("https://", "http://", "file://")):
        raise DevclusterError(
            f"GOPROXY is {setting!r}: no module proxy to fetch Go from; install Go 1.25 or newer"
        )
    return first


def _unpack(archive: Path, target: Path) -> None:
    """Unpack beside the target and rename, so that a half-unpacked toolchain is never found."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(archive) as bundle:
        bundle.extractall(partial)
    (root,) = (partial / "golang.org").iterdir()
    # Module zips carry no permissions.
    for program in [*(root / "bin").iterdir(), *(root / "pkg" / "tool").rglob("*")]:
        program.chmod(0o755)
    shutil.rmtree(target, ignore_errors=True)
    root.rename(target)
    shutil.rmtree(partial)
