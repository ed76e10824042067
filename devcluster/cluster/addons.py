"""CoreDNS: a process in the hub's network namespace, which every pod reaches by one fixed address."""

from __future__ import annotations

from pathlib import Path

from devcluster.cluster import network
from devcluster.cluster.api import Api
from devcluster.cluster.model import DNS_DOMAIN, Layout
from devcluster.pki import Authority, write

_ROLES = "/apis/rbac.authorization.k8s.io/v1"


def corefile(cluster: Layout, kubeconfig: Path) -> str:
    """CoreDNS' configuration: names of the cluster; every other name does not exist, and says so at once."""
    return f"""{DNS_DOMAIN} in-addr.arpa {{
    bind {cluster.dns_address}
    errors
    kubernetes {DNS_DOMAIN} in-addr.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 1
    }}
}}
. {{
    bind {cluster.dns_address}
    errors
    template ANY ANY . {{
        rcode NXDOMAIN
    }}
}}
"""


def coredns(cluster: Layout, server: str, binary: Path) -> list[object]:
    """Write CoreDNS' files; returns its command line."""
    kubeconfig = Authority(cluster.pki).kubeconfig(
        cluster.pki / "coredns.kubeconfig", server, "coredns", "system:coredns"
    )
    path = cluster.state / "Corefile"
    write(path, corefile(cluster, kubeconfig))
    return [*network.in_netns(cluster.hub), binary, "-conf", path]


def grant(api: Api) -> None:
    """Let CoreDNS read what it serves."""
    rules = [
        {
            "apiGroups": [""],
            "resources": ["services", "namespaces", "pods", "endpoints"],
            "verbs": ["list", "watch"],
        },
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    name = {"name": "system:coredns"}
    api.create(f"{_ROLES}/clusterroles", {"metadata": name, "rules": rules})
    binding = {
        "metadata": name,
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:coredns"}],
    }
    api.create(f"{_ROLES}/clusterrolebindings", binding)
