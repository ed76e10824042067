"""Where things are kept: a cache that outlives clusters, state that does not, and a runtime folder on tmpfs."""

from __future__ import annotations

import os
from pathlib import Path

# Kernel objects (bridges, network namespaces) belong to the machine, not to a user's state folder, and vanish at a
# reboot: what reserves them must be as global and as short-lived, hence a fixed folder on tmpfs.
RUNTIME = Path("/run/trainyard")


def cache_root() -> Path:
    """Built tools and node image stores: expensive to make, safe to delete while no cluster is up."""
    return Path(os.environ.get("TRAINYARD_CACHE") or Path.home() / ".cache" / "trainyard").absolute()


def state_root() -> Path:
    """Everything that belongs to clusters that are up: pids, logs, keys, etcd's data."""
    return Path(
        os.environ.get("TRAINYARD_STATE") or Path.home() / ".local" / "state" / "trainyard"
    ).absolute()


def nodes_cache() -> Path:
    """The image stores of all clusters' nodes."""
    return cache_root() / "nodes"


def node_cache(cluster: str, node: str) -> Path:
    """A node's image store; kept by `down`, so that the next `up` need not import 1.8 GB again."""
    return nodes_cache() / cluster / node
