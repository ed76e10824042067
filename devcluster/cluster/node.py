"""One node: its namespaces, and containerd, kubelet and kube-proxy in them."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from devcluster.cluster import cgroups, network, nodeconfig
from devcluster.cluster.model import Node
from devcluster.pki import Authority, write
from devcluster.proc import Process, run, stop_all
from devcluster.progress import wait_for

# Gives the node a /run, /var/lib and /var/log of its own, then holds the mount namespace open.
# $1 run, $2 lib, $3 log, $4 images, then the program to become.
_MOUNTS = """
set -e
mount --make-rprivate /
mkdir -p "$2/containerd"
mount --bind "$4" "$2/containerd"
mount --rbind "$2" /var/lib
mount --rbind "$3" /var/log
# Last, because the program and the rest may be below /run.
cp "$5" "$1/pause"
mount --rbind "$1" /run
exec /run/pause
"""


class NodeMachine:
    """The running parts of a node; which of them run is always read from the machine, never remembered."""

    def __init__(self, node: Node, tools: Mapping[str, Path]) -> None:
        self.node = node
        self.tools = tools
        cluster = node.cluster
        self.keeper = self._process("keeper")
        self.containerd = self._process("containerd")
        self.kubelet = self._process("kubelet")
        self.proxy = self._process("kube-proxy")
        self.authority = Authority(cluster.pki)

    def _process(self, part: str) -> Process:
        name = f"{self.node.name}-{part}"
        return Process(name, self.node.cluster.pids, self.node.cluster.logs / f"{name}.log")

    @property
    def parts(self) -> list[Process]:
        return [self.kubelet, self.proxy, self.containerd, self.keeper]

    # Starting

    def ensure_runtime(self) -> None:
        """Network, mounts, containerd: everything that needs no apiserver."""
        node = self.node
        if not self.keeper.running:
            self.kill()
            _clear(node.run)
            for folder in (node.run, node.lib, node.log, node.images):
                folder.mkdir(parents=True, exist_ok=True)
        network.ensure_node(node)
        cgroups.make_node(node.cgroup)
        if not self.keeper.running:
            script = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", _MOUNTS, "keeper"]
            folders = [node.run, node.lib, node.log, node.images, self.tools["pause"]]
            self._start(self.keeper, [*script, *folders], inside=False)
            wait_for(
                f"waiting for {node.name}'s mounts",
                lambda: (node.run / "pause").exists() and _is_held(self.keeper),
                seconds=10,
                alive=lambda: self.keeper.running,
                log=self.keeper.log,
                every=0.01,
            )
        self._write_runtime_files()
        if not self.containerd.running:
            self._clean_store()
            self._start_containerd()

    def ensure_kubelet(self, server: str) -> bool:
        """kubelet and kube-proxy, which need the apiserver's address; whether the kubelet had to be started."""
        self._write_kubelet_files(server)
        if not self.proxy.running:
            self._start(self.proxy, nodeconfig.proxy_command(self.node, self.tools["kube-proxy"]))
        if self.kubelet.running:
            return False
        self._start(self.kubelet, nodeconfig.kubelet_command(self.node, self.tools["kubelet"]))
        return True

    def _start(self, process: Process, command: list[object], *, inside: bool = True) -> None:
        group = cgroups.make_system(self.node.cluster.cgroup, self.node.name)
        process.start([*(self.enter() if inside else []), *command], cgroup=group)

    def enter(self) -> list[str]:
        """The start of a command line that runs on this node."""
        pid = self.keeper.pid
        if pid is None:
            raise RuntimeError(f"{self.node.name} is not up")
        return ["nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--net=/run/netns/{self.node.netns}", "--"]

    def ctr(
        self, *arguments: object, seconds: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """containerd's own client, in Kubernetes' namespace."""
        return run(*self.ctr_command(*arguments), seconds=seconds, check=check)

    def ctr_command(self, *arguments: object) -> list[str]:
        socket = self.node.run / "containerd" / "containerd.sock"
        return [
            "ctr",
            "--address",
            str(socket),
            "--namespace",
            "k8s.io",
            *[str(argument) for argument in arguments],
        ]

    def _start_containerd(self, config: str = "containerd.toml") -> None:
        self._start(self.containerd, ["containerd", "--config", f"{nodeconfig.ETC}/{config}"])
        wait_for(
            f"waiting for {self.node.name}'s containerd",
            lambda: self.ctr("version", check=False).returncode == 0,
            seconds=30,
            alive=lambda: self.containerd.running,
            log=self.containerd.log,
            every=0.05,
        )

    def _clean_store(self) -> None:
        """Forget the containers of a former life, whose pods this cluster does not know; keep the images.

        Done by a containerd without CRI, which would otherwise take them over. When the last life ended in order, or
        there was none, there is nothing to do.
        """
        used = self.node.images / "used"
        if used.exists():
            self._start_containerd("containerd-clean.toml")
            self.forget_containers()
            self.containerd.stop()
        used.touch()

    def forget_containers(self) -> None:
        """Delete every container and lease, and with them (by containerd's garbage collection) their snapshots."""
        for kind, remove in (
            ("containers", ["containers", "delete"]),
            ("leases", ["leases", "delete", "--sync"]),
        ):
            names = self.ctr(kind, "list", "--quiet", check=False).stdout.split()
            for name in names:
                self.ctr(*remove, name, check=False)
        for folder in ("io.containerd.grpc.v1.cri", "io.containerd.runtime.v2.task"):
            shutil.rmtree(self.node.images / folder, ignore_errors=True)

    # Files

    def _write_runtime_files(self) -> None:
        etc = self.node.run / "etc"
        write(etc / "containerd.toml", nodeconfig.containerd())
        write(etc / "containerd-clean.toml", nodeconfig.containerd(cri=False))
        write(etc / "registries" / "_default" / "hosts.toml", nodeconfig.NO_REGISTRY)
        write(etc / "cni" / "10-trainyard.conflist", nodeconfig.cni(self.node))
        write(etc / "resolv.conf", f"nameserver {self.node.cluster.dns_address}\n")

    def _write_kubelet_files(self, server: str) -> None:
        node, etc = self.node, self.node.run / "etc"
        user = f"system:node:{node.name}"
        self.authority.kubeconfig(etc / "kubelet.kubeconfig", server, f"{node.name}", user, ["system:nodes"])
        self.authority.kubeconfig(etc / "kube-proxy.kubeconfig", server, "kube-proxy", "system:kube-proxy")
        certificate, key = self.authority.issue(
            f"{node.name}-server", user, ["system:nodes"], [node.name, node.address]
        )
        for name, source in {
            "ca.crt": self.authority.certificate,
            "kubelet.crt": certificate,
            "kubelet.key": key,
        }.items():
            write(etc / name, source.read_text(), mode=0o600)
        write(etc / "kubelet.json", nodeconfig.kubelet(node))

    # Stopping

    def stop_kubelet(self) -> None:
        """Only the kubelet dies; containers go on."""
        self.kubelet.stop(how=signal.SIGKILL)

    def kill(self) -> None:
        """Everything on the node dies at once, as if its power were cut."""
        cluster = self.node.cluster
        cgroups.kill(f"{cluster.cgroup}/system/{self.node.name}")
        cgroups.kill(self.node.cgroup)
        stop_all(self.parts)
        cgroups.remove(self.node.cgroup)

    def shut_down(self) -> None:
        """End the node in order, so that its image store needs no cleaning next time."""
        stop_all([self.kubelet, self.proxy], seconds=2)
        cgroups.kill(self.node.cgroup)
        if self.containerd.running and self.keeper.running:
            self.forget_containers()
            self.containerd.stop()
            (self.node.images / "used").unlink(missing_ok=True)
        self.kill()
        network.remove_node(self.node)
        _clear(self.node.run)


def _is_held(keeper: Process) -> bool:
    """Whether the keeper has become the pause program, which is to say that all mounts are made."""
    try:
        return Path(f"/proc/{keeper.pid}/comm").read_text().strip() == "pause"
    except OSError:
        return False


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
