"""The cluster as a whole: up, down, status, images, faults."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from devcluster.cluster import (
    cgroups,
    controlplane,
    images,
    network,
    parts,
    preflight,
    registry,
    scratch,
    state,
)
from devcluster.cluster.api import Api
from devcluster.cluster.model import PAUSE_IMAGE, Layout, number_of
from devcluster.cluster.node import NodeMachine
from devcluster.errors import DevclusterError
from devcluster.filelock import locked
from devcluster.gotools import build
from devcluster.paths import RUNTIME, nodes_cache, state_root
from devcluster.pki import Authority
from devcluster.proc import Process, run, stop_all
from devcluster.progress import say, step, wait_for
from devcluster.s3 import S3Access

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """What runs of a cluster."""

    name: str
    server: str
    kubeconfig: Path
    components: dict[str, bool]
    nodes: dict[str, str]
    s3: S3Access | None

    @property
    def healthy(self) -> bool:
        return all(self.components.values()) and all(node == "Ready" for node in self.nodes.values())


class Cluster:
    """A cluster by name. What it consists of is read from the machine each time, so any program may use any cluster."""

    def __init__(self, name: str = "dev") -> None:
        self.name = name
        Layout(name, 0)  # refuses a bad name

    # Where things are

    @property
    def layout(self) -> Layout:
        layout = registry.find(self.name)
        if layout is None:
            raise DevclusterError(
                f"cluster {self.name!r} is not up: python -m devcluster.cluster up --name {self.name}"
            )
        return layout

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.layout.kubeconfig

    @property
    def audit_log(self) -> Path:
        """One JSON object a line: every request that the audit policy does not leave out."""
        return self.layout.audit_log

    @property
    def host_address(self) -> str:
        """The host's address as nodes and pods see it."""
        return self.layout.host_address

    @property
    def s3(self) -> S3Access:
        """The S3 server, once `start_s3` has been called."""
        if access := parts.s3_access(self.layout):
            return access
        raise DevclusterError(f"cluster {self.name!r} has no S3 server: start_s3 (or the verb s3) starts one")

    @property
    def node_names(self) -> list[str]:
        return [machine.node.name for machine in self._machines()]

    @property
    def exists(self) -> bool:
        """Whether it is up, or was begun to be."""
        return registry.find(self.name) is not None

    def _machines(
        self, layout: Layout | None = None, tools: Mapping[str, Path] | None = None
    ) -> list[NodeMachine]:
        """The nodes; with programs only where some are to be started, since changed pins may mean minutes of building."""
        layout = layout or self.layout
        count = state.load(layout.state).nodes
        return [NodeMachine(layout.node(number), tools or {}) for number in range(1, count + 1)]

    def _machine(self, node: str, tools: Mapping[str, Path] | None = None) -> NodeMachine:
        number = number_of(node)
        machines = self._machines(tools=tools)
        if not 1 <= number <= len(machines):
            raise DevclusterError(f"cluster {self.name!r} has no {node}: it has {', '.join(self.node_names)}")
        return machines[number - 1]

    @contextmanager
    def _locked(self, why: str) -> Iterator[None]:
        preflight.require_root()
        with locked(RUNTIME / f"{self.name}.lock", why, seconds=900, remove=True):
            yield

    # Up and down

    def up(self, nodes: int = 2) -> None:
        """Bring it up, or mend it; more nodes than it has are added, fewer change nothing."""
        Layout(self.name, 0).node(nodes)  # refuses a bad number
        preflight.check()
        tools = build.ensure()
        with self._locked(f"bringing up cluster {self.name!r}"):
            if registry.find(self.name) is None:
                # After a reboot: of what ran nothing is left, and what it remembered may not fit its new addresses.
                shutil.rmtree(state_root() / self.name, ignore_errors=True)
            layout = registry.claim(self.name)
            saved = state.load(layout.state)
            if saved.nodes < nodes:
                saved.nodes = nodes
                state.save(layout.state, saved)
            with step(f"bringing up cluster {self.name!r} with {saved.nodes} nodes"):
                self._ensure_all(layout, tools)

    def _ensure_all(self, layout: Layout, tools: dict[str, Path]) -> None:
        network.ensure_hub(layout)
        settings = parts.settings(layout, tools)
        controlplane.prepare(settings)
        machines = self._machines(layout, tools)
        pause = images.read_image(scratch.pause(layout.state / "pause-image", tools["pause"]), PAUSE_IMAGE)

        def runtime(machine: NodeMachine) -> None:
            machine.ensure_runtime()
            images.load(machine, pause, PAUSE_IMAGE)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            runtimes = [pool.submit(runtime, machine) for machine in machines]
            parts.ensure_control_plane(layout, settings)
            for future in runtimes:
                future.result()
        network.ensure_routes([machine.node for machine in machines])
        started: dict[str, float] = {}
        for machine in machines:
            begin = time.time()
            if machine.ensure_kubelet(settings.server):
                started[machine.node.name] = begin
        if parts.s3_access(layout):
            parts.ensure_s3(layout, tools["versitygw"])
        self._await_nodes(settings, machines, started)

    def _await_nodes(
        self, settings: controlplane.Settings, machines: list[NodeMachine], started: dict[str, float]
    ) -> None:
        api = settings.api()
        plugged = [machine for machine in machines if network.link_is_up(machine.node)]
        for machine in set(machines) - set(plugged):
            say(f"{machine.node.name} is cut off: not waiting for it")
        for machine in plugged:
            wait_for(
                f"waiting for {machine.node.name} to be Ready",
                lambda machine=machine: _is_ready(api, machine, started),  # type: ignore[misc]
                seconds=90,
                alive=lambda kubelet=machine.kubelet: kubelet.running,  # type: ignore[misc]
                log=machine.kubelet.log,
                every=0.2,
            )
        manager = settings.process("kube-controller-manager")
        wait_for(
            "waiting for the default service account",
            lambda: api.call("GET", "/api/v1/namespaces/default/serviceaccounts/default")[0] == 200,
            seconds=60,
            alive=lambda: manager.running,
            log=manager.log,
        )

    def down(self, *, purge: bool = False) -> None:
        """Remove it without a trace; `purge` removes its nodes' image stores too."""
        with self._locked(f"taking down cluster {self.name!r}"):
            layout = registry.find(self.name)
            if layout is not None:
                with step(f"taking down cluster {self.name!r}"):
                    self._remove(layout)
            elif (state_root() / self.name).exists():
                shutil.rmtree(state_root() / self.name)
            if purge:
                shutil.rmtree(nodes_cache() / self.name, ignore_errors=True)
            if layout is not None:
                registry.release(layout)

    def _remove(self, layout: Layout) -> None:
        machines = self._machines(layout)
        _each(lambda machine: machine.shut_down(), machines)
        stop_all([parts.process(layout, name) for name in (*parts.COMPONENTS, "s3")], how=signal.SIGKILL)
        cgroups.kill(layout.cgroup)
        cgroups.remove(layout.cgroup)
        network.remove(layout)
        _remove_folder(layout.state)
        _remove_folder(layout.runtime)

    # Looking

    def status(self) -> Status:
        """What of it runs, and which nodes the apiserver believes to be well."""
        layout = self.layout
        components = {name: parts.process(layout, name).running for name in parts.COMPONENTS}
        access = parts.s3_access(layout)
        if access:
            components["s3"] = parts.process(layout, "s3").running
        ready = Api(layout.server, Authority(layout.pki)).nodes()
        nodes = {}
        for machine in self._machines(layout):
            name = machine.node.name
            components |= {part.name: part.running for part in machine.parts}
            known = "Unknown" if name not in ready else "NotReady" if ready[name] is None else "Ready"
            nodes[name] = known if network.link_is_up(machine.node) else f"{known}, cut off"
        return Status(self.name, layout.server, layout.kubeconfig, components, nodes, access)

    def logs(self, component: str) -> Path:
        """A component's log; the names are those of `status`."""
        path = self.layout.logs / f"{component}.log"
        if not path.exists():
            names = sorted(file.stem for file in self.layout.logs.glob("*.log"))
            raise DevclusterError(f"{component!r} has no log; these have: {', '.join(names)}")
        return path

    def kubectl(self, *arguments: object, text: str | None = None, seconds: float = 120) -> str:
        """Run kubectl as administrator and return what it prints; `text` is its standard input."""
        kubectl = build.ensure("kubectl")["kubectl"]
        return run(kubectl, "--kubeconfig", self.kubeconfig, *arguments, text=text, seconds=seconds).stdout

    # Images and storage

    def load_image(
        self, oci_path: Path, ref: str, nodes: Iterable[str] | None = None
    ) -> dict[str, int | None]:
        """Bring an image to nodes (to all by default): bytes sent to each, None where it was there already."""
        image = images.read_image(Path(oci_path), ref)
        machines = [self._machine(node) for node in nodes] if nodes is not None else self._machines()
        with self._locked(f"loading {ref}"):
            sent = _each(lambda machine: images.load(machine, image, ref), machines)
        return {machine.node.name: count for machine, count in zip(machines, sent, strict=True)}

    def start_s3(self) -> S3Access:
        """Start an S3 server that belongs to the cluster: `up` mends it and `down` removes it with its data."""
        with self._locked("starting the S3 server"):
            return parts.ensure_s3(self.layout, build.ensure("versitygw")["versitygw"])

    # Faults

    def cut(self, node: str) -> None:
        """Pull a node's cable: what it says is lost, nobody gets a reset, and after 40 s it is NotReady."""
        network.set_link(self._machine(node).node, up=False)

    def join(self, node: str) -> None:
        """Plug a node's cable in again."""
        network.set_link(self._machine(node).node, up=True)

    def kill_node(self, node: str) -> None:
        """Cut a node's power: all its processes die at once. `up` brings it back, empty."""
        self._machine(node).kill()

    def restart_kubelet(self, node: str) -> None:
        """Kill a node's kubelet and start another; containers go on."""
        machine = self._machine(node, build.ensure("kubelet", "kube-proxy"))
        machine.stop_kubelet()
        machine.ensure_kubelet(machine.node.cluster.server)

    def process(self, component: str) -> Process:
        """A component by its name in `status`, to be killed by a test; `up` mends it."""
        return parts.process(self.layout, component)


def _each(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Do it for all at once; the first failure is raised when all have ended."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [future.result() for future in [pool.submit(work, item) for item in items]]


def _is_ready(api: Api, machine: NodeMachine, started: dict[str, float]) -> bool:
    """Whether a node is Ready, by what its kubelet said since it was started: older news is its predecessor's."""
    heartbeat = api.nodes().get(machine.node.name)
    # Heartbeats are in whole seconds.
    return heartbeat is not None and heartbeat >= int(started.get(machine.node.name, 0))


def _remove_folder(folder: Path) -> None:
    """Remove a folder; one that cannot be removed must not pass unseen."""
    if folder.exists():
        shutil.rmtree(folder)
