"""Wheels for a base image's Python, downloaded once on the host: image builds then need no network."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.images import files, locks, uv
from devcluster.progress import step

# glibc versions of the manylinux tags (PEP 600) that are taken; testing's glibc is newer than all of them.
_GLIBC = range(17, 41)


def ensure(lock: str, python: str) -> Path:
    """A folder with the lock's wheels for a Python ("3.14") and an unpacked pip; in `files.exclusive`."""
    final = folder(lock, python)
    if final.exists():
        return final
    with (
        files.workspace() as work,
        step(f"downloading the wheels of locks/{lock}.txt for Python {python}, which the cache has not got"),
    ):
        partial = work / "wheels"
        partial.mkdir()
        options = ["--quiet", "--python", sys.executable, "--require-hashes"]
        uv.run("pip", "install", *options, "--target", partial / "pip", "-r", locks.path("pip"))
        _download(_pins(lock, python, work), partial, python)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(final)
    return final


def folder(lock: str, python: str) -> Path:
    """Where the wheels of a lock as it is now belong, whether they are there or not."""
    key = hashlib.sha256(locks.path(lock).read_bytes() + locks.path("pip").read_bytes()).hexdigest()[:12]
    return files.wheels() / f"{lock}-{python}-{key}"


def _pins(lock: str, python: str, work: Path) -> Path:
    """The lock without the pins for other Pythons and platforms: pip would go by the host's Python."""
    target = work / "pins.txt"
    machine = platform.machine()
    options = [
        "--python-version",
        python,
        "--python-platform",
        f"{machine}-unknown-linux-gnu",
        "--no-deps",
        "--quiet",
    ]
    shape = ["--generate-hashes", "--no-emit-index-url", "--no-annotate", "--no-header"]
    uv.run("pip", "compile", locks.path(lock), *options, *shape, "--output-file", target)
    chosen = re.sub(r" ;.*(?= \\$)", "", target.read_text(), flags=re.MULTILINE)
    foreign = {
        name
        for name, versions in locks.pins(chosen).items()
        if not versions <= locks.pins(locks.path(lock).read_text())[name]
    }
    if foreign:
        raise DevclusterError(
            f"uv chose other versions than locks/{lock}.txt has, of: {', '.join(sorted(foreign))}"
        )
    target.write_text(chosen)
    return target


def _download(pins: Path, target: Path, python: str) -> None:
    machine = platform.machine()
    tags = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC] + [
        f"manylinux2014_{machine}",
        f"linux_{machine}",
    ]
    abi = f"cp{python.replace('.', '')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--only-binary",
        ":all:",
        "--require-hashes",
        "--python-version",
        python,
        "--implementation",
        "cp",
    ]
    command += [f"--platform={tag}" for tag in tags] + [f"--abi={each}" for each in (abi, "abi3", "none")]
    result = subprocess.run(
        [*command, "--dest", str(target), "-r", str(pins)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(target / "pip")},
        timeout=900,
        check=False,
    )
    if result.returncode != 0:
        raise DevclusterError(f"pip download for Python {python} failed: {result.stderr.strip()[-2000:]}")
