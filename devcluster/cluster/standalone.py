"""A control plane without nodes, for tests, on loopback and without root: the test itself plays the kubelet."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from types import TracebackType

from devcluster.cluster import controlplane
from devcluster.cluster.controlplane import Ports, Settings
from devcluster.gotools import build
from devcluster.ports import free_ports
from devcluster.proc import Process, run, stop_all
from devcluster.progress import wait_for

_HOST = "127.0.0.1"


class ControlPlane:
    """etcd, kube-apiserver and kube-controller-manager in a folder, on free ports.

    They die with the thread that started them, however it ends (the kernel sees to that), so start it from one that
    lives long, such as the main thread.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir = Path(workdir).absolute() / "control-plane"
        self._settings: Settings | None = None

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.workdir / "kubeconfig"

    @property
    def audit_log(self) -> Path:
        return self.workdir / "logs" / "audit.log"

    @property
    def settings(self) -> Settings:
        """What the components were started with."""
        if self._settings is None:
            raise RuntimeError("the control plane is not started")
        return self._settings

    @property
    def server(self) -> str:
        return self.settings.server

    @property
    def env(self) -> dict[str, str]:
        """What a program needs in its environment to talk to it."""
        return {"KUBECONFIG": str(self.kubeconfig)}

    def start(self) -> None:
        """Start it and wait until objects can be made in the default namespace."""
        names = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
        etcd, peer, manager, scheduler, apiserver = free_ports(5)
        ports = Ports(etcd, peer, manager, scheduler, apiserver)
        # What a killed program left there: its processes died with it.
        shutil.rmtree(self.workdir, ignore_errors=True)
        self.workdir.mkdir(parents=True)
        settings = self._settings = Settings(
            self.workdir, _HOST, ports, "10.255.0.0/24", build.ensure(*names)
        )
        try:
            controlplane.prepare(settings)
            self._start("etcd", controlplane.etcd(settings))
            controlplane.await_etcd(settings)
            self._start("kube-apiserver", controlplane.apiserver(settings))
            controlplane.await_apiserver(settings)
            self._start("kube-controller-manager", controlplane.controller_manager(settings))
            self._await_default_account()
        except BaseException:
            self.stop()
            raise

    def _start(self, name: str, command: list[object]) -> None:
        self.settings.process(name).start(command, dies_with_parent=True)

    def _await_default_account(self) -> None:
        """The default service account is made by the controller manager: pods are refused until it is there."""
        manager, api = self.process("kube-controller-manager"), self.settings.api()
        path = "/api/v1/namespaces/default/serviceaccounts/default"
        wait_for(
            "waiting for the default service account",
            lambda: api.call("GET", path)[0] == 200,
            seconds=30,
            alive=lambda: manager.running,
            log=manager.log,
            every=0.05,
        )

    def process(self, name: str) -> Process:
        """A component, to look at its log or to hurt it."""
        return self.settings.process(name)

    def kubectl(self, *arguments: object, text: str | None = None) -> str:
        """Run kubectl and return what it prints."""
        kubectl = self.settings.tools["kubectl"]
        return run(kubectl, "--kubeconfig", self.kubeconfig, *arguments, text=text).stdout

    def stop(self) -> None:
        """End everything and remove the folder."""
        if self._settings is not None:
            names = ("kube-controller-manager", "kube-apiserver", "etcd")
            # Nothing is kept, so nothing need end in order; the apiserver's own way would take seconds.
            stop_all([self.process(name) for name in names], how=signal.SIGKILL)
            self._settings = None
        for _ in range(20):
            shutil.rmtree(self.workdir, ignore_errors=True)
            if not self.workdir.exists():
                break
            time.sleep(0.05)

    def __enter__(self) -> ControlPlane:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
