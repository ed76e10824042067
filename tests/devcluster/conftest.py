"""What these tests need of the machine; what it lacks is said as the reason of a skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.cluster import Cluster
from devcluster.cluster.scratch import make_layout

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="nodes are namespaces and containers: needs root")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything with nodes in it needs root, and what starts a cluster may build it first."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()) or item.path.name == "test_real_interrupted.py":
            item.add_marker(needs_root)
        if item.path.name.startswith("test_real_"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes which nobody else uses, and of which nothing is left in the end."""
    made = Cluster("devtest")
    try:
        made.up(nodes=2)
        yield made
    finally:
        made.down(purge=True)


@pytest.fixture(scope="module")
def toolbox(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with a shell in it, on every node."""
    busybox = shutil.which("busybox")
    if busybox is None:
        from devcluster import debian

        debian.ensure(["busybox-static"], "the tests need an image with a shell in it")
        busybox = shutil.which("busybox") or "/bin/busybox"
    names = ("sh", "sleep", "nslookup", "httpd", "nc", "echo", "cat", "tail")
    files: dict[str, bytes | str] = {"bin/busybox": Path(busybox).read_bytes()}
    files |= {f"bin/{name}": "busybox" for name in names}
    layout = make_layout(tmp_path_factory.mktemp("toolbox"), [files], ["/bin/sh"])
    cluster.load_image(layout, "test.local/toolbox:1")
    return "test.local/toolbox:1"
