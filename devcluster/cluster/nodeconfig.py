"""The configuration files of a node's containerd, CNI plugins, kubelet and kube-proxy.

A node has a mount namespace in which /run, /var/lib and /var/log are its own: so these files can name the usual
paths, and nothing which a node writes there is ever seen on the host.
"""

from __future__ import annotations

import json

from devcluster.cluster.model import DNS_DOMAIN, PAUSE_IMAGE, Node

# As the node sees it.
ETC = "/run/etc"
SOCKET = "/run/containerd/containerd.sock"
CNI_PLUGINS = "/usr/lib/cni"


def containerd(*, cri: bool = True) -> str:
    """containerd's configuration; without CRI it only serves to clean up an image store."""
    disabled = ["aufs", "btrfs", "devmapper", "zfs"]
    off = [f"io.containerd.snapshotter.v1.{name}" for name in disabled]
    off += [
        "io.containerd.tracing.processor.v1.otlp",
        "io.containerd.internal.v1.tracing",
        "io.containerd.internal.v1.opt",
    ]
    off += [] if cri else ["io.containerd.grpc.v1.cri"]
    return f"""version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = {json.dumps(off)}

[grpc]
  address = "{SOCKET}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # The host's AppArmor knows no profile of ours.
  disable_apparmor = true
  # Where even root may not lower it (in a container or sandbox), runc would fail to start any pod at all.
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{ETC}/cni"

  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"

      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false

  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{ETC}/registries"
"""


# There is no registry: an image that was not loaded must fail at once, not after a minute of trying to reach one.
NO_REGISTRY = """server = "http://127.0.0.1:1"

[host."http://127.0.0.1:1"]
  capabilities = ["pull", "resolve"]
"""


def cni(node: Node) -> str:
    """Pods are routed (ptp), not bridged: a Service's answer then always comes back the way it must."""
    ipam = {
        "type": "host-local",
        "dataDir": "/run/cni-addresses",
        "ranges": [[{"subnet": str(node.pods)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    plugins = [{"type": "ptp", "ipMasq": False, "ipam": ipam}]
    return json.dumps({"cniVersion": "0.4.0", "name": "trainyard", "plugins": plugins}, indent=1)


def kubelet(node: Node) -> str:
    """The kubelet's configuration file."""
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "tlsCertFile": f"{ETC}/kubelet.crt",
        "tlsPrivateKeyFile": f"{ETC}/kubelet.key",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{ETC}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "clusterDNS": [node.cluster.dns_address],
        "clusterDomain": DNS_DOMAIN,
        "resolvConf": f"{ETC}/resolv.conf",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.cgroup}",
        "failCgroupV1": False,
        "failSwapOn": False,
        # Nodes share one machine: each believes to have all of it, and none may evict for what others use.
        "enforceNodeAllocatable": [],
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
            "imagefs.inodesFree": "1%",
        },
        # An image that was loaded cannot be pulled again: never collect any.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "serializeImagePulls": False,
        "maxPods": 110,
        "registryPullQPS": 0,
        "eventRecordQPS": 0,
        "kubeAPIQPS": 100,
        "kubeAPIBurst": 200,
        "syncFrequency": "10s",
        "nodeStatusUpdateFrequency": "2s",
        "nodeStatusReportFrequency": "1m",
        "podLogsDir": "/var/log/pods",
        "makeIPTablesUtilChains": False,
    }
    return json.dumps(config, indent=1)


def kubelet_command(node: Node, binary: object) -> list[object]:
    return [
        binary,
        f"--config={ETC}/kubelet.json",
        f"--kubeconfig={ETC}/kubelet.kubeconfig",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
        "--root-dir=/var/lib/kubelet",
        "--cert-dir=/var/lib/kubelet/pki",
        "--v=1",
    ]


def proxy_command(node: Node, binary: object) -> list[object]:
    return [
        binary,
        f"--kubeconfig={ETC}/kube-proxy.kubeconfig",
        f"--hostname-override={node.name}",
        "--proxy-mode=nftables",
        f"--cluster-cidr={node.cluster.pod_network}",
        "--healthz-bind-address=127.0.0.1:10256",
        "--metrics-bind-address=127.0.0.1:10249",
        # Limits of connection tracking can only be set from the host's own network namespace.
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
    ]
