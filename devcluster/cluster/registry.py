"""Which clusters exist on this machine, and what is left of those that no longer do.

An index decides a cluster's addresses and the names of its kernel objects. It is reserved by a file on tmpfs: like
those objects it belongs to the machine and not to a user's state folder, and like them it is gone after a reboot.
"""

from __future__ import annotations

import json
from pathlib import Path

from devcluster.cluster import cgroups, network
from devcluster.cluster.model import MAX_CLUSTERS, Layout
from devcluster.errors import DevclusterError
from devcluster.filelock import locked
from devcluster.paths import RUNTIME, cache_root, nodes_cache, state_root
from devcluster.pki import write
from devcluster.proc import GUARDED


def _record(index: int) -> Path:
    return RUNTIME / f"{index}.json"


def registered() -> dict[int, dict[str, str]]:
    """Every reserved index, with the cluster's name and state folder."""
    return {int(path.stem): json.loads(path.read_text()) for path in RUNTIME.glob("[0-9]*.json")}


def find(name: str) -> Layout | None:
    """The cluster of that name, if it has been brought up, however far that got."""
    for index, record in registered().items():
        if record["name"] == name:
            layout = Layout(name, index)
            if record["state"] != str(layout.state):
                raise DevclusterError(
                    f"cluster {name!r} is up already, with its state in {record['state']}: set TRAINYARD_STATE to that "
                    "folder's parent, or choose another name"
                )
            return layout
    return None


def claim(name: str) -> Layout:
    """The cluster of that name, with an index reserved for it."""
    with locked(RUNTIME / "registry.lock", "reserving addresses", seconds=30):
        if layout := find(name):
            return layout
        taken = registered()
        for index in range(MAX_CLUSTERS):
            layout = Layout(name, index)
            if index in taken or network.left_links(layout.prefix) or network.overlapping_routes(layout):
                continue
            write(_record(index), json.dumps({"name": name, "state": str(layout.state)}))
            return layout
    raise DevclusterError(
        f"all {MAX_CLUSTERS} blocks of addresses are taken, by clusters or by this machine's routes"
    )


def release(layout: Layout) -> None:
    """Give the index back: the very last thing that is done to a cluster."""
    with locked(RUNTIME / "registry.lock", "releasing addresses", seconds=30):
        _record(layout.index).unlink(missing_ok=True)


def leftovers() -> list[str]:
    """What is on this machine of clusters that are not registered: after a `down` there must be nothing."""
    known = registered()
    found: list[str] = []
    for index in set(range(MAX_CLUSTERS)) - set(known):
        layout = Layout("any", index)
        found += [f"network namespace {name}" for name in network.left_netns(f"{layout.prefix}-")]
        found += [f"link {name}" for name in network.left_links(layout.prefix) if name == layout.prefix]
        found += [f"cgroup {path}" for path in cgroups.left(layout.cgroup) if path.name == layout.cgroup]
        found += [f"process {pid}" for pid in cgroups.members(layout.cgroup)]
        if layout.runtime.exists():
            found.append(f"folder {layout.runtime}")
    states = {record["state"] for record in known.values()}
    if state_root().exists():
        found += [
            f"folder {path}" for path in state_root().iterdir() if path.is_dir() and str(path) not in states
        ]
    return found + _mounts() + _processes(known)


def _mounts() -> list[str]:
    """Mounts on the host below our folders: a node's are in its own namespace, so there is never any."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    own = (str(state_root()), str(RUNTIME), str(nodes_cache()))
    return [f"mount {point}" for point in points if point.startswith(own)]


def _processes(known: dict[int, dict[str, str]]) -> list[str]:
    """Processes that were started from our cache of programs but belong to no registered cluster's cgroup."""
    theirs = {pid for index in known for pid in cgroups.members(Layout("any", index).cgroup)}
    programs = str(cache_root() / "gotools")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            program = (folder / "exe").readlink()
        except OSError:
            continue
        if str(program).startswith(programs) and int(folder.name) not in theirs and not _is_guarded(folder):
            found.append(f"process {folder.name} ({program.name})")
    return found


def _is_guarded(folder: Path) -> bool:
    """Whether a process belongs to a test which looks after it, or runs in the foreground as kubectl does."""
    try:
        if (folder / "exe").readlink().name == "kubectl":
            return True
        return f"{GUARDED}=".encode() in (folder / "environ").read_bytes()
    except OSError:
        return True
