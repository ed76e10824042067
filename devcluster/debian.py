"""Installs missing Debian packages without letting any of them start a service."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.filelock import locked
from devcluster.progress import say, step

# What a node needs to run containers.
NODE = (
    "containerd",
    "runc",
    "containernetworking-plugins",
    "nftables",
    "conntrack",
    "iproute2",
    "util-linux",
    "socat",
    "openssl",
    "mount",
)
# What building container images without a registry needs.
IMAGES = ("buildah", "debootstrap")

_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = (
    "#!/bin/sh\n# Put here by trainyard's development cluster while it installs packages.\nexit 101\n"
)


def missing(packages: Iterable[str]) -> list[str]:
    """Those of the packages that are not installed."""
    wanted = list(dict.fromkeys(packages))
    out = subprocess.run(
        ["dpkg-query", "-W", "-f=${Package} ${db:Status-Status}\n", *wanted],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    installed = {line.split()[0] for line in out.splitlines() if line.endswith(" installed")}
    return [package for package in wanted if package not in installed]


def ensure(packages: Iterable[str], why: str = "the development cluster runs them") -> None:
    """Install what is missing; does nothing, and needs no root, when nothing is."""
    if shutil.which("dpkg-query") is None:
        raise DevclusterError(
            "this is not a Debian-like system: install containerd, runc, CNI plugins and nftables yourself"
        )
    if not (needed := missing(packages)):
        return
    if os.geteuid() != 0:
        raise DevclusterError(f"not root, so cannot install: apt-get install {' '.join(needed)}")
    with (
        locked(Path("/run/trainyard-apt.lock"), "installing packages", seconds=1200, remove=True),
        _no_services(),
    ):
        if needed := missing(needed):
            _install(needed, why)


def _install(packages: list[str], why: str) -> None:
    with step(f"installing {', '.join(packages)} with apt-get, because {why} (about a minute)"):
        # Another apt-get may be at work: DPkg::Lock::Timeout waits for it.
        options = ["-q", "-y", "-o", "DPkg::Lock::Timeout=300"]
        result = _apt("install", "--no-install-recommends", *options, *packages)
        if result.returncode != 0:
            say("apt-get install failed with the package lists at hand: fetching new ones")
            _apt("update", *options[:1])
            result = _apt("install", "--no-install-recommends", *options, *packages)
        if result.returncode != 0:
            raise DevclusterError(f"apt-get install {' '.join(packages)} failed:\n{result.stdout[-2000:]}")


def _apt(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        ["apt-get", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    """Debian's own switch against starting services: Debian's containerd would be one too many."""
    if _POLICY.exists() and _POLICY.read_text() != _POLICY_TEXT:
        yield
        return
    _POLICY.write_text(_POLICY_TEXT)
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)
