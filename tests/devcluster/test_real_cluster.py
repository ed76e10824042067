"""A cluster with nodes: pods run, find each other, and lose each other when a node is cut off."""

from __future__ import annotations

import json
import time

from devcluster.cluster import Cluster, leftovers
from devcluster.cluster.model import PAUSE_IMAGE


def pod(cluster: Cluster, name: str, node: str, image: str, *command: str, **spec: object) -> None:
    container = {"name": "c", "image": image, **({"command": list(command)} if command else {})}
    metadata = {"name": name, "labels": {"app": name}}
    body = {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container], **spec}
    cluster.kubectl(
        "apply",
        "-f",
        "-",
        text=json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": body}),
    )


def await_pods(cluster: Cluster, *names: str) -> None:
    cluster.kubectl("wait", "--for=condition=Ready", *[f"pod/{name}" for name in names], "--timeout=60s")


def get(cluster: Cluster, what: str, path: str) -> str:
    return cluster.kubectl("get", *what.split(), "-o", f"jsonpath={{{path}}}")


def test_up_again_changes_nothing(cluster: Cluster) -> None:
    pids = {name: cluster.process(name).pid for name in cluster.status().components}
    cluster.up(nodes=1)
    assert cluster.status().healthy
    assert pids == {name: cluster.process(name).pid for name in cluster.status().components}


def test_scheduler_places_pods_on_both_nodes(cluster: Cluster) -> None:
    cluster.kubectl("create", "deployment", "spread", f"--image={PAUSE_IMAGE}", "--replicas=4")
    cluster.kubectl("wait", "--for=condition=Available", "deployment/spread", "--timeout=60s")
    assert set(get(cluster, "pods -l app=spread", ".items[*].spec.nodeName").split()) == set(
        cluster.node_names
    )
    cluster.kubectl("delete", "deployment", "spread")


def test_missing_image_fails_at_once(cluster: Cluster) -> None:
    pod(cluster, "missing", "node-1", "nowhere.local/nothing:1")
    deadline = time.monotonic() + 20
    reason = ""
    while "ErrImagePull" not in reason and "ImagePullBackOff" not in reason and time.monotonic() < deadline:
        time.sleep(0.2)
        reason = get(cluster, "pod missing", ".status.containerStatuses[0].state.waiting.reason")
    assert reason in {"ErrImagePull", "ImagePullBackOff"}
    cluster.kubectl("delete", "pod", "missing", "--wait=false")


def test_services_names_logs_and_exec_across_nodes(cluster: Cluster, toolbox: str) -> None:
    serve = "echo hello > /index.html; echo serving; exec httpd -f -p 8080 -h /"
    pod(cluster, "web", "node-1", toolbox, "/bin/sh", "-c", serve)
    pod(cluster, "client", "node-2", toolbox, "/bin/sleep", "1000000")
    cluster.kubectl("expose", "pod", "web", "--port=80", "--target-port=8080")
    await_pods(cluster, "web", "client")
    address = get(cluster, "service web", ".spec.clusterIP")

    def inside(script: str) -> str:
        return cluster.kubectl("exec", "client", "--", "/bin/sh", "-c", script)

    ask = f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {address} 80 | tail -n 1"
    deadline = time.monotonic() + 10
    while (answer := inside(ask)) != "hello\n" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert answer == "hello\n"
    assert address in inside("nslookup web.default.svc.cluster.local; true")
    assert "NXDOMAIN" in inside("nslookup example.com. || true")
    assert cluster.kubectl("logs", "web") == "serving\n"


def test_projected_tokens_are_reviewed(cluster: Cluster, toolbox: str) -> None:
    token = {"serviceAccountToken": {"audience": "trainyard", "path": "token", "expirationSeconds": 600}}
    volumes = [{"name": "token", "projected": {"sources": [token]}}]
    container = {"name": "c", "image": toolbox, "command": ["/bin/sleep", "1000000"]}
    container |= {"volumeMounts": [{"name": "token", "mountPath": "/token"}]}
    pod(cluster, "token", "node-1", toolbox, volumes=volumes, containers=[container])
    await_pods(cluster, "token")
    secret = cluster.kubectl("exec", "token", "--", "/bin/cat", "/token/token")
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview"}
    review |= {"spec": {"token": secret, "audiences": ["trainyard"]}}
    status = json.loads(cluster.kubectl("create", "-o", "json", "-f", "-", text=json.dumps(review)))["status"]
    assert status["authenticated"]
    assert status["user"]["username"] == "system:serviceaccount:default:default"


def test_images_are_sent_once(cluster: Cluster, toolbox: str, tmp_path: object) -> None:
    from pathlib import Path

    from devcluster.cluster.scratch import make_layout

    base, folder = {"base": b"x" * 20_000_000}, Path(str(tmp_path))
    first = cluster.load_image(make_layout(folder, [base, {"v": b"1"}], ["/v"]), "test.local/layers:1")
    assert all(sent is not None and sent < 100_000 for sent in first.values())
    again = cluster.load_image(folder, "test.local/layers:1")
    assert set(again.values()) == {None}
    changed = cluster.load_image(make_layout(folder, [base, {"v": b"2"}], ["/v"]), "test.local/layers:1")
    assert all(sent is not None and sent < 100_000 for sent in changed.values())


def test_s3_is_reached_from_pods(cluster: Cluster, toolbox: str) -> None:
    access = cluster.start_s3()
    access.make_bucket("bucket")
    pod(cluster, "s3", "node-2", toolbox, "/bin/sleep", "1000000")
    await_pods(cluster, "s3")
    script = f"printf 'GET /bucket HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {access.host} {access.port}"
    assert "403" in cluster.kubectl("exec", "s3", "--", "/bin/sh", "-c", script).splitlines()[0]


def test_a_node_is_cut_off_and_joins_again(cluster: Cluster) -> None:
    cluster.cut("node-2")
    assert "cut off" in cluster.status().nodes["node-2"]
    cluster.kubectl("wait", "--for=condition=Ready=Unknown", "node/node-2", "--timeout=90s")
    cluster.join("node-2")
    cluster.kubectl("wait", "--for=condition=Ready", "node/node-2", "--timeout=90s")


def test_a_lost_node_and_dead_components_are_mended(cluster: Cluster) -> None:
    cluster.kill_node("node-1")
    cluster.process("kube-scheduler").stop()
    cluster.process("coredns").stop()
    assert not cluster.status().healthy
    cluster.up()
    assert cluster.status().healthy


def test_another_cluster_and_a_third_node(cluster: Cluster) -> None:
    other = Cluster("devtest-two")
    try:
        other.up(nodes=1)
        other.up(nodes=2)
        assert other.status().nodes == {"node-1": "Ready", "node-2": "Ready"}
        assert cluster.status().healthy
        assert other.host_address != cluster.host_address
    finally:
        other.down(purge=True)
    assert leftovers() == []
    assert cluster.status().healthy
