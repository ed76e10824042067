"""A cluster's names, addresses and folders: all of them follow from its name and its index on this machine."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from pathlib import Path

from devcluster.paths import RUNTIME, node_cache, state_root

# 198.18.0.0/15 is set aside for test benches between networks, so that nothing a machine really talks to is in it.
BLOCK = ipaddress.IPv4Network("198.18.0.0/15")
MAX_CLUSTERS = 16
MAX_NODES = 14
DNS_DOMAIN = "cluster.local"
PAUSE_IMAGE = "trainyard.local/pause:1"
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Everything about a cluster that is known before any of it runs."""

    name: str
    index: int

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"cluster name {self.name!r}: lower-case letters, digits and dashes, 32 at most")
        if not 0 <= self.index < MAX_CLUSTERS:
            raise ValueError(f"cluster index {self.index}: at most {MAX_CLUSTERS} clusters fit on a machine")

    # Folders

    @property
    def state(self) -> Path:
        return state_root() / self.name

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def pids(self) -> Path:
        return self.state / "pids"

    @property
    def runtime(self) -> Path:
        """On tmpfs, and short: a Unix socket's path may have 107 characters only."""
        return RUNTIME / str(self.index)

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def audit_log(self) -> Path:
        return self.logs / "audit.log"

    # Kernel objects

    @property
    def prefix(self) -> str:
        """The start of the name of every network namespace and link of this cluster."""
        return f"ty{self.index}"

    @property
    def hub(self) -> str:
        """The network namespace that holds the bridge: there, no firewall of the host sees the nodes' traffic."""
        return f"{self.prefix}-hub"

    @property
    def cgroup(self) -> str:
        return f"trainyard{self.index}"

    # Addresses: a /19 for each cluster, of which the first /24 is the bridge's

    @property
    def network(self) -> ipaddress.IPv4Network:
        size = BLOCK.num_addresses // MAX_CLUSTERS
        return ipaddress.IPv4Network((int(BLOCK.network_address) + self.index * size, 19))

    @property
    def bridge_network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network((int(self.network.network_address), 24))

    @property
    def service_network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network((int(self.network.network_address) + (4 << 8), 22))

    @property
    def pod_network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network((int(self.network.network_address) + (16 << 8), 20))

    @property
    def host_address(self) -> str:
        """The host's address on the bridge: the apiserver's and the S3 server's."""
        return str(self.bridge_network[1])

    @property
    def dns_address(self) -> str:
        """The bridge's own address, inside the hub, so that port 53 of the host stays free."""
        return str(self.bridge_network[2])

    @property
    def server(self) -> str:
        return f"https://{self.host_address}:6443"

    def node(self, number: int) -> Node:
        return Node(self, number)


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster: a network namespace, a mount namespace, a cgroup and some folders."""

    cluster: Layout
    number: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= MAX_NODES:
            raise ValueError(f"node number {self.number}: a cluster has 1 to {MAX_NODES} nodes")

    @property
    def name(self) -> str:
        return f"node-{self.number}"

    @property
    def netns(self) -> str:
        return f"{self.cluster.prefix}-{self.name}"

    @property
    def link(self) -> str:
        """The bridge's end of the node's cable, in the hub."""
        return self.name

    @property
    def cgroup(self) -> str:
        """The kubelet's cgroup root."""
        return f"{self.cluster.cgroup}/{self.name}"

    @property
    def address(self) -> str:
        return str(self.cluster.bridge_network[10 + self.number])

    @property
    def pods(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network((int(self.cluster.pod_network.network_address) + (self.number << 8), 24))

    @property
    def run(self) -> Path:
        """What the node sees as /run."""
        return self.cluster.runtime / self.name

    @property
    def lib(self) -> Path:
        """What the node sees as /var/lib."""
        return self.cluster.state / "nodes" / self.name / "lib"

    @property
    def log(self) -> Path:
        """What the node sees as /var/log."""
        return self.cluster.state / "nodes" / self.name / "log"

    @property
    def images(self) -> Path:
        """What the node sees as /var/lib/containerd: the part which outlives the cluster."""
        return node_cache(self.cluster.name, self.name) / "containerd"

    @property
    def process(self) -> str:
        """The name of the process that holds the node's mount namespace."""
        return self.name


def number_of(node: str) -> int:
    """The number in a node's name."""
    match = re.fullmatch(r"node-([0-9]+)", node)
    if not match:
        raise ValueError(f"{node!r} is not a node's name: they are node-1, node-2, ...")
    return int(match[1])
