"""Configuration files: readable by those who read them, with what was found to matter in them."""

from __future__ import annotations

import json
import socket
import tomllib
from pathlib import Path

import pytest

from devcluster import ports
from devcluster.cluster import addons, controlplane, nodeconfig
from devcluster.cluster.controlplane import Ports, Settings
from devcluster.cluster.model import Layout
from devcluster.errors import DevclusterError

NODE = Layout("c", 1).node(2)
CRI = "io.containerd.grpc.v1.cri"


def test_containerd_config_is_toml() -> None:
    config = tomllib.loads(nodeconfig.containerd())
    assert config["version"] == 2
    assert config["plugins"][CRI]["restrict_oom_score_adj"] is True
    assert CRI not in config["disabled_plugins"]
    assert CRI in tomllib.loads(nodeconfig.containerd(cri=False))["disabled_plugins"]
    assert tomllib.loads(nodeconfig.NO_REGISTRY)["server"].startswith("http://127.0.0.1")


def test_kubelet_config() -> None:
    config = json.loads(nodeconfig.kubelet(NODE))
    assert config["cgroupRoot"] == f"/{NODE.cgroup}"
    assert config["failCgroupV1"] is False
    assert config["enforceNodeAllocatable"] == []
    assert config["imageGCHighThresholdPercent"] == 100


def test_pods_are_routed_within_their_nodes_block() -> None:
    (plugin,) = json.loads(nodeconfig.cni(NODE))["plugins"]
    assert plugin["type"] == "ptp"
    assert plugin["ipam"]["ranges"] == [[{"subnet": "198.18.50.0/24"}]]


def test_dns_knows_the_cluster_before_it_denies_the_rest() -> None:
    text = addons.corefile(NODE.cluster, Path("/k"))
    assert text.index("kubernetes cluster.local") < text.index("NXDOMAIN")
    # In one block the catch-all would come first, whatever the order of the lines.
    assert text.count(f"bind {NODE.cluster.dns_address}") == 2


def test_audit_policy_records_every_write() -> None:
    first = controlplane.AUDIT_POLICY["rules"][0]  # type: ignore[index]
    assert first == {
        "level": "Metadata",
        "verbs": ["create", "update", "patch", "delete", "deletecollection"],
    }


def test_control_plane_listens_where_it_should(tmp_path: Path) -> None:
    tools = {name: Path(name) for name in ("etcd", "kube-apiserver")}
    settings = Settings(tmp_path, "198.18.0.1", Ports(1, 2, 3, 4), "198.18.4.0/22", tools)
    assert "--bind-address=198.18.0.1" in controlplane.apiserver(settings)
    assert "--kubelet-preferred-address-types=InternalIP" in controlplane.apiserver(settings)
    assert "--listen-client-urls=http://127.0.0.1:1" in controlplane.etcd(settings)


def test_free_ports_differ() -> None:
    found = ports.free_ports(20)
    assert len(set(found)) == 20
    assert all(ports.is_free(port, "127.0.0.1") for port in found)


def test_a_taken_port_is_said_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DevclusterError, match="another program does"):
            ports.check_free(taken.getsockname()[1], "127.0.0.1", "kube-apiserver")
