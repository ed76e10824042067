"""What etcd, kube-apiserver, kube-controller-manager and kube-scheduler are started with, and the starting of them."""

from __future__ import annotations

import dataclasses
import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from devcluster.cluster.api import Api
from devcluster.pki import Authority, write
from devcluster.proc import Process
from devcluster.progress import wait_for

# Writes are always recorded, since tests count them. What the control plane itself and the nodes read is noise.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"]},
        {"level": "None", "userGroups": ["system:nodes", "system:serviceaccounts:kube-system"]},
        {
            "level": "None",
            "users": [
                "system:apiserver",
                "system:kube-controller-manager",
                "system:kube-scheduler",
                "system:kube-proxy",
                "system:coredns",
            ],
        },
        {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/version", "/openapi*"]},
        {"level": "Metadata"},
    ],
}


@dataclasses.dataclass(frozen=True, slots=True)
class Ports:
    """Loopback ports, chosen anew when one that is needed has been taken by somebody else."""

    etcd: int
    etcd_peer: int
    controller_manager: int
    scheduler: int
    apiserver: int = 6443


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Where a control plane keeps its files and on which address it answers."""

    state: Path
    address: str
    ports: Ports
    services: str
    tools: Mapping[str, Path]

    @property
    def server(self) -> str:
        return f"https://{self.address}:{self.ports.apiserver}"

    @property
    def authority(self) -> Authority:
        return Authority(self.state / "pki")

    @property
    def audit_log(self) -> Path:
        return self.state / "logs" / "audit.log"

    def api(self) -> Api:
        return Api(self.server, self.authority)

    def process(self, name: str) -> Process:
        return Process(name, self.state / "pids", self.state / "logs" / f"{name}.log")

    def kubeconfig(self, component: str) -> Path:
        path = self.state / "pki" / f"{component}.kubeconfig"
        return self.authority.kubeconfig(path, self.server, component, f"system:{component}")


def prepare(settings: Settings) -> None:
    """Write everything that the components read."""
    authority = settings.authority
    authority.ensure()
    first_service = settings.services.rpartition(".")[0] + ".1"
    names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ]
    authority.issue(
        "apiserver", "kube-apiserver", addresses=[*names, settings.address, "127.0.0.1", first_service]
    )
    # The apiserver as a client of kubelets: they ask it who may do what, and masters may.
    authority.issue("apiserver-kubelet", "kube-apiserver", ["system:masters"])
    authority.kubeconfig(settings.state / "kubeconfig", settings.server, "admin", "admin", ["system:masters"])
    write(settings.state / "audit-policy.json", json.dumps(AUDIT_POLICY, indent=1))


def etcd(settings: Settings) -> list[object]:
    client = f"http://127.0.0.1:{settings.ports.etcd}"
    peer = f"http://127.0.0.1:{settings.ports.etcd_peer}"
    return [
        settings.tools["etcd"],
        "--name=etcd",
        f"--data-dir={settings.state / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=etcd={peer}",
        # What a development cluster holds may be lost with the machine; waiting for a shared disk is slow.
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def apiserver(settings: Settings) -> list[object]:
    pki = settings.state / "pki"
    return [
        settings.tools["kube-apiserver"],
        f"--bind-address={settings.address}",
        f"--advertise-address={settings.address}",
        f"--secure-port={settings.ports.apiserver}",
        f"--etcd-servers=http://127.0.0.1:{settings.ports.etcd}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
        f"--kubelet-client-certificate={pki / 'apiserver-kubelet.crt'}",
        f"--kubelet-client-key={pki / 'apiserver-kubelet.key'}",
        # Node names resolve nowhere: without this, logs and exec fail.
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki / 'tokens.key'}",
        f"--service-account-signing-key-file={pki / 'tokens.key'}",
        f"--service-cluster-ip-range={settings.services}",
        f"--audit-policy-file={settings.state / 'audit-policy.json'}",
        f"--audit-log-path={settings.audit_log}",
    ]


def controller_manager(settings: Settings) -> list[object]:
    pki = settings.state / "pki"
    return [
        settings.tools["kube-controller-manager"],
        *_client(settings, "kube-controller-manager", settings.ports.controller_manager),
        f"--root-ca-file={pki / 'ca.crt'}",
        f"--service-account-private-key-file={pki / 'tokens.key'}",
        "--use-service-account-credentials=true",
        # By default it allows itself 20 requests a second, of which its own start takes seconds.
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        f"--cluster-signing-cert-file={pki / 'ca.crt'}",
        f"--cluster-signing-key-file={pki / 'ca.key'}",
    ]


def scheduler(settings: Settings) -> list[object]:
    return [settings.tools["kube-scheduler"], *_client(settings, "kube-scheduler", settings.ports.scheduler)]


def _client(settings: Settings, component: str, port: int) -> list[object]:
    kubeconfig = settings.kubeconfig(component)
    return [
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        # There is one of each, and waiting for a lease of a dead predecessor would cost 15 s.
        "--leader-elect=false",
    ]


def etcd_healthy(settings: Settings) -> bool:
    """Whether etcd answers and has a leader."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{settings.ports.etcd}/health", timeout=2) as answer:
            return b'"true"' in answer.read()
    except OSError:
        return False


def await_etcd(settings: Settings) -> None:
    """Wait until etcd answers."""
    process = settings.process("etcd")
    wait_for(
        "waiting for etcd's health",
        lambda: etcd_healthy(settings),
        seconds=30,
        alive=lambda: process.running,
        log=process.log,
        every=0.05,
    )


def await_apiserver(settings: Settings) -> None:
    """Wait until the apiserver has finished starting."""
    process = settings.process("kube-apiserver")
    wait_for(
        "waiting for kube-apiserver's /readyz",
        settings.api().ready,
        seconds=60,
        alive=lambda: process.running,
        log=process.log,
        every=0.05,
    )
