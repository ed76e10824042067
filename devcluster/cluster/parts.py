"""Bringing the parts of a cluster that are not nodes to what they should be: start what is dead, leave what is well."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from devcluster import ports, s3
from devcluster.cluster import addons, cgroups, controlplane, state
from devcluster.cluster.controlplane import Ports, Settings
from devcluster.cluster.model import Layout
from devcluster.proc import Process
from devcluster.s3 import S3Access

COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "coredns")
S3_PORT = 9000
S3_ACCESS_KEY = "trainyard"


def process(layout: Layout, name: str) -> Process:
    """A component by its name."""
    return Process(name, layout.pids, layout.logs / f"{name}.log")


def ensure_process(
    layout: Layout, name: str, command: list[object], env: Mapping[str, str] | None = None
) -> bool:
    """Start a component unless it runs just so; whether it had to be started."""
    component = process(layout, name)
    if component.runs_as(command):
        return False
    component.stop()
    component.start(command, cgroup=cgroups.make_system(layout.cgroup, "control-plane"), env=env)
    return True


def settings(layout: Layout, tools: Mapping[str, Path]) -> Settings:
    """The control plane's settings, with ports that it has or can have."""
    saved = state.load(layout.state)
    if saved.ports is None or not _usable(layout, saved.ports):
        saved.ports = Ports(*ports.free_ports(4))
        state.save(layout.state, saved)
    return Settings(layout.state, layout.host_address, saved.ports, str(layout.service_network), tools)


def _usable(layout: Layout, chosen: Ports) -> bool:
    """Whether each port is its component's or free to be so."""
    users = {
        "etcd": (chosen.etcd, chosen.etcd_peer),
        "kube-controller-manager": (chosen.controller_manager,),
        "kube-scheduler": (chosen.scheduler,),
    }
    return all(
        process(layout, name).running or all(ports.is_free(port, "127.0.0.1") for port in needed)
        for name, needed in users.items()
    )


def ensure_control_plane(layout: Layout, wanted: Settings) -> None:
    """etcd, apiserver, controller manager, scheduler and CoreDNS, in that order."""
    if not process(layout, "kube-apiserver").running:
        ports.check_free(wanted.ports.apiserver, layout.host_address, "kube-apiserver")
    ensure_process(layout, "etcd", controlplane.etcd(wanted))
    controlplane.await_etcd(wanted)
    ensure_process(layout, "kube-apiserver", controlplane.apiserver(wanted))
    controlplane.await_apiserver(wanted)
    ensure_process(layout, "kube-controller-manager", controlplane.controller_manager(wanted))
    ensure_process(layout, "kube-scheduler", controlplane.scheduler(wanted))
    addons.grant(wanted.api())
    ensure_process(layout, "coredns", addons.coredns(layout, wanted.server, wanted.tools["coredns"]))


def s3_access(layout: Layout) -> S3Access | None:
    """The cluster's S3 server, if it was ever asked for."""
    secret = state.load(layout.state).s3_secret
    return S3Access(layout.host_address, S3_PORT, S3_ACCESS_KEY, secret) if secret else None


def ensure_s3(layout: Layout, binary: Path) -> S3Access:
    """Start the cluster's S3 server unless it runs, and wait until it answers."""
    saved = state.load(layout.state)
    if saved.s3_secret is None:
        saved.s3_secret = secrets.token_urlsafe(24)
        state.save(layout.state, saved)
    access = S3Access(layout.host_address, S3_PORT, S3_ACCESS_KEY, saved.s3_secret)
    data = layout.state / "s3"
    s3.check_folder(data)
    if not process(layout, "s3").running:
        ports.check_free(access.port, access.host, "the S3 server")
    command = s3.command_line(binary, data, access, layout.logs / "s3-access.log")
    ensure_process(layout, "s3", command, s3.root_keys(access))
    access.await_health(process(layout, "s3"))
    return access
