"""The cluster's cables: a bridge in a network namespace of its own, the host and every node plugged into it.

The bridge is not on the host because there the host's firewall would see its traffic (Docker's drops it), and so that
removing one namespace removes it all. Pods are routed, not bridged: each node owns a /24 of the pod network.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from pathlib import Path

from devcluster.cluster.model import Layout, Node
from devcluster.proc import CommandError, run

_NETNS = Path("/run/netns")
BRIDGE = "br0"


def in_netns(netns: str) -> list[str]:
    """The start of a command line that runs in a network namespace.

    Not `ip netns exec`: that mounts /sys anew, and so hides the cgroups.
    """
    return ["nsenter", f"--net={_NETNS / netns}", "--"]


def ensure_hub(cluster: Layout) -> None:
    """The bridge and the host's cable to it."""
    _ensure_netns(cluster.hub)
    hub, width = in_netns(cluster.hub), cluster.bridge_network.prefixlen
    if not _has_link(cluster.hub, BRIDGE):
        run(*hub, "ip", "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0")
    run(*hub, "ip", "address", "replace", f"{cluster.dns_address}/{width}", "dev", BRIDGE)
    run(*hub, "ip", "link", "set", BRIDGE, "up")
    # CoreDNS lives in the hub and its answers go to pods, by way of their nodes: the host knows the routes.
    if not _host_has(cluster.prefix):
        run("ip", "link", "add", cluster.prefix, "type", "veth", "peer", "name", "host", "netns", cluster.hub)
    run(*hub, "ip", "link", "set", "host", "master", BRIDGE, "up")
    run("ip", "address", "replace", f"{cluster.host_address}/{width}", "dev", cluster.prefix)
    run("ip", "link", "set", cluster.prefix, "up")


def ensure_node(node: Node) -> None:
    """A node's network namespace, its cable to the bridge, and everybody's route to its pods."""
    cluster = node.cluster
    _ensure_netns(node.netns)
    inside, hub = in_netns(node.netns), in_netns(cluster.hub)
    if not _has_link(cluster.hub, node.link):
        run(*hub, "ip", "link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", node.netns)
    run(*hub, "ip", "link", "set", node.link, "master", BRIDGE, "up")
    run(
        *inside,
        "ip",
        "address",
        "replace",
        f"{node.address}/{cluster.bridge_network.prefixlen}",
        "dev",
        "eth0",
    )
    run(*inside, "ip", "link", "set", "eth0", "up")
    run(*inside, "ip", "route", "replace", "default", "via", cluster.host_address)
    run(*inside, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
    _route(in_netns(cluster.hub), node)
    _route([], node)


def ensure_routes(nodes: list[Node]) -> None:
    """Every node's routes to the pods of the others."""
    for here in nodes:
        for there in nodes:
            if here != there:
                _route(in_netns(here.netns), there)


def set_link(node: Node, *, up: bool) -> None:
    """Plug or pull the node's cable: what is on its way is lost, and nobody is told by a reset."""
    run(*in_netns(node.cluster.hub), "ip", "link", "set", node.link, "up" if up else "down")


def link_is_up(node: Node) -> bool:
    """Whether the node's cable is plugged."""
    result = run(*in_netns(node.cluster.hub), "ip", "-o", "link", "show", node.link, check=False)
    return result.returncode == 0 and ",UP" in result.stdout.replace("<UP", "<,UP")


def remove_node(node: Node) -> None:
    """Remove a node's network namespace; its cable goes with it."""
    _remove_netns(node.netns)


def remove(cluster: Layout) -> None:
    """Remove every namespace and link of a cluster."""
    for name in [*left_netns(f"{cluster.prefix}-")]:
        _remove_netns(name)
    run("ip", "link", "delete", cluster.prefix, check=False)
    # The kernel removes a namespace's links in the background.
    deadline = time.monotonic() + 5
    while _host_has(cluster.prefix) and time.monotonic() < deadline:
        time.sleep(0.02)


def left_netns(prefix: str) -> list[str]:
    """Network namespaces whose names begin so."""
    return sorted(path.name for path in _NETNS.glob(f"{prefix}*")) if _NETNS.exists() else []


def left_links(prefix: str) -> list[str]:
    """The host's links whose names begin so."""
    return sorted(link.name for link in Path("/sys/class/net").iterdir() if link.name.startswith(prefix))


def overlapping_routes(cluster: Layout) -> bool:
    """Whether the host already routes some of the cluster's addresses elsewhere."""
    for line in run("ip", "-4", "route", "show").stdout.splitlines():
        with contextlib.suppress(ValueError, IndexError):
            if ipaddress.IPv4Network(line.split()[0]).overlaps(cluster.network):
                return True
    return False


def _route(where: list[str], node: Node) -> None:
    run(*where, "ip", "route", "replace", node.pods, "via", node.address)


def _ensure_netns(name: str) -> None:
    path = _NETNS / name
    # A mere file is what a namespace leaves behind when it was being made or unmade.
    if path.exists() and not _is_netns(path):
        path.unlink()
    if not path.exists():
        run("ip", "netns", "add", name)
    run(*in_netns(name), "ip", "link", "set", "lo", "up")


def _is_netns(path: Path) -> bool:
    return path.stat().st_dev != _NETNS.stat().st_dev


def _remove_netns(name: str) -> None:
    try:
        run("ip", "netns", "delete", name)
    except CommandError:
        (_NETNS / name).unlink(missing_ok=True)


def _has_link(netns: str, link: str) -> bool:
    return run(*in_netns(netns), "ip", "link", "show", link, check=False).returncode == 0


def _host_has(link: str) -> bool:
    return Path("/sys/class/net", link).exists()
