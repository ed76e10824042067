"""The cluster's cgroups: how its nodes' pods are confined, and how every last process of it is found again.

Every process that is started for a cluster enters `<cluster>/system` (or a folder below) before it becomes what it
is to be, and what a container runs is below its node's cgroup. So whatever happened to pid files, and whoever became
the parent of whom, the members of these cgroups are the cluster's processes, all of them, and nobody else's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from devcluster.errors import DevclusterError

_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")


def hierarchies() -> list[Path]:
    """Where every cgroup hierarchy is mounted: many with version 1, one with version 2."""
    found = _mounted("cgroup") or _mounted("cgroup2")
    if not found:
        raise DevclusterError("no cgroup hierarchy is mounted: containers cannot run here")
    return found


def _everywhere() -> list[Path]:
    """All hierarchies: beside those of version 1 there may be one of version 2, in which runc leaves folders too."""
    return _mounted("cgroup") + _mounted("cgroup2")


def _mounted(kind: str) -> list[Path]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return list(dict.fromkeys(Path(fields[1]).resolve() for fields in mounts if fields[2] == kind))


def tracking() -> Path:
    """The hierarchy whose members tell which processes are whose: no container manager ever moves a process out of it
    other than to another cgroup of the same cluster."""
    found = hierarchies()
    return next((path for path in found if path.name == "pids"), found[0])


def version_1() -> bool:
    return not (hierarchies()[0] / "cgroup.controllers").exists()


def make_system(cluster: str, part: str) -> Path:
    """A cgroup for processes which are no containers, in the tracking hierarchy only."""
    path = tracking() / cluster / "system" / part
    path.mkdir(parents=True, exist_ok=True)
    return path


def make_node(cgroup: str) -> None:
    """A kubelet's cgroup root, in every hierarchy."""
    for root in hierarchies():
        path = root
        for part in Path(cgroup).parts:
            parent, path = path, path / part
            path.mkdir(exist_ok=True)
            if version_1():
                # An empty cpuset takes no processes: a new one starts with what its parent has.
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if (path / name).exists() and not (path / name).read_text().strip():
                        (path / name).write_text((parent / name).read_text())
            else:
                _delegate(parent)
        if not version_1():
            _delegate(path)


def _delegate(path: Path) -> None:
    available = (path / "cgroup.controllers").read_text().split()
    for controller in _CONTROLLERS:
        if controller in available:
            (path / "cgroup.subtree_control").write_text(f"+{controller}")


def members(cgroup: str) -> list[int]:
    """The processes in a cgroup and everything below it."""
    found: list[int] = []
    for folder, _, _ in os.walk(tracking() / cgroup):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (Path(folder) / "cgroup.procs").read_text().split()]
    return found


def kill(cgroup: str, *, seconds: float = 10) -> None:
    """Kill everything in a cgroup and below, until nothing is left."""
    deadline = time.monotonic() + seconds
    while pids := members(cgroup):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise DevclusterError(f"processes {pids} in cgroup {cgroup} do not die")
        time.sleep(0.02)


def remove(cgroup: str) -> None:
    """Remove a cgroup and all below it from every hierarchy; they must have no members."""
    for root in _everywhere():
        for attempt in range(50):
            for folder, _, _ in os.walk(root / cgroup, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()
            if not (root / cgroup).exists():
                break
            # The kernel takes a moment to let go of a cgroup whose last process has just died.
            time.sleep(0.01 * (attempt + 1))


def left(prefix: str) -> list[Path]:
    """Top-level cgroups whose names begin so."""
    return [path for root in _everywhere() for path in root.glob(f"{prefix}*") if path.is_dir()]
