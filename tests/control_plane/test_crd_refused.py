"""What the API refuses when a run is created: the answer names the field and says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.control_plane.manifests import REMOVE, checkpoint, env, spec, terms, training_run, volume
from tests.control_plane.server import RUNS, Server
from trainyard_api.contract import RESERVED_ENV, RESERVED_ENV_PREFIXES

DRY_RUN = {"dryRun": "All", "fieldValidation": "Strict"}
CLAIM = {"claimName": "shared"}
SHARED = [{"name": "ckpt", "mountPath": "/ckpt", "persistentVolumeClaim": CLAIM}]
SECRET_KEY = {"secretKeyRef": {"name": "s", "key": "k"}}

# id: (changes to a good run, field that the answer names, part of its message)
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    # required fields
    "no image": (spec(image=REMOVE), "spec.image", "Required"),
    "no nodes": (spec(nodes=REMOVE), "spec.nodes", "Required"),
    "no nodes.min": (spec(nodes={}), "spec.nodes.min", "Required"),
    "no checkpoint": (spec(checkpoint=REMOVE), "spec.checkpoint", "Required"),
    "no uri": (spec(checkpoint={}), "spec.checkpoint.uri", "Required"),
    # name
    "long name": ({"metadata.name": "a" * 41}, "metadata.name", "at most 40"),
    "name with dot": ({"metadata.name": "a.b"}, "metadata.name", "without '.'"),
    # what to run
    "empty image": (spec(image=""), "spec.image", "at least 1 chars"),
    "image with space": (spec(image="a b"), "spec.image", "must not contain spaces"),
    "pull policy": (spec(imagePullPolicy="Sometimes"), "spec.imagePullPolicy", '"Always", "IfNotPresent", "Never"'),
    "no script, no command": (spec(script=REMOVE), "spec", "set exactly one of script"),
    "script and command": (spec(command=["a.py"]), "spec", "set exactly one of script"),
    "script key": (
        spec(script={"configMap": {"name": "a", "key": "train.sh"}}), "spec.script.configMap.key", "must end in .py",
    ),
    "empty command": (spec(script=REMOVE, command=[]), "spec.command", "at least 1 items"),
    "python in command": (spec(script=REMOVE, command=["python3.12", "a.py"]), "spec.command", "leave out python"),
    "shell in command": (spec(script=REMOVE, command=["/bin/sh", "-c", "x"]), "spec.command", "leave out python"),
    "binary as command": (spec(script=REMOVE, command=["/app/train"]), "spec.command", "ends in .py"),
    "-m without module": (spec(script=REMOVE, command=["-m"]), "spec.command", "name of a module"),
    "too many args": (spec(args=["x"] * 129), "spec.args", "at most 128"),
    "long arg": (spec(args=["x" * 1025]), "spec.args[0]", "1024"),
    "relative workingDir": (spec(workingDir="app"), "spec.workingDir", "absolute path"),
    "preload": (spec(preload=["import os"]), "spec.preload[0]", "should match"),
    "managedBy": (spec(managedBy="me"), "spec.managedBy", "at least 3 chars"),
    "managedBy without path": (spec(managedBy="example.com"), "spec.managedBy", "a domain, a slash and a path"),
    # size
    "no node": (spec(nodes={"min": 0}), "spec.nodes.min", "greater than or equal to 1"),
    "10^9 nodes": (spec(nodes={"min": 10**9}), "spec.nodes.min", "less than or equal to 1024"),
    "elastic": (spec(nodes={"min": 2, "max": 4}), "spec.nodes.max", "elastic ranges are not supported yet"),
    "no process": (spec(processesPerNode=0), "spec.processesPerNode", "greater than or equal to 1"),
    "world": (spec(nodes={"min": 1024}, processesPerNode=8), "spec.processesPerNode", "must not be above 4096"),
    "grace": (spec(terminationGracePeriodSeconds=0), "spec.terminationGracePeriodSeconds", "greater than or equal to 1"),
    "deadline": (spec(activeDeadlineSeconds=0), "spec.activeDeadlineSeconds", "greater than or equal to 1"),
    "ttl": (spec(ttlSecondsAfterFinished=-1), "spec.ttlSecondsAfterFinished", "greater than or equal to 0"),
    # environment
    "env name": (env("A B", value="x"), "spec.env[0].name", "must begin with a letter"),
    "env twice": (spec(env=[{"name": "A"}, {"name": "A"}]), "spec.env[1]", "Duplicate value"),
    "value and valueFrom": (env("A", value="x", valueFrom=SECRET_KEY), "spec.env[0].valueFrom", "remove one of them"),
    "no source": (env("A", valueFrom={}), "spec.env[0].valueFrom", "exactly one of valueFrom.configMapKeyRef"),
    "two sources": (
        env("A", valueFrom={**SECRET_KEY, "fieldRef": {"fieldPath": "metadata.name"}}),
        "spec.env[0].valueFrom", "exactly one of valueFrom.configMapKeyRef",
    ),
    "field of the pod": (
        env("A", valueFrom={"fieldRef": {"fieldPath": "spec.serviceAccountName"}}),
        "spec.env[0].valueFrom.fieldRef.fieldPath", "Unsupported value",
    ),
    "envFrom without source": (spec(envFrom=[{}]), "spec.envFrom[0]", "exactly one of envFrom.configMapRef"),
    "envFrom with two": (
        spec(envFrom=[{"configMapRef": {"name": "a"}, "secretRef": {"name": "a"}}]),
        "spec.envFrom[0]", "exactly one of envFrom.configMapRef",
    ),
    "envFrom prefix": (
        spec(envFrom=[{"prefix": "PET_", "configMapRef": {"name": "a"}}]), "spec.envFrom[0].prefix", "reserved",
    ),
    "65 variables": (spec(env=[{"name": f"A{i}"} for i in range(65)]), "spec.env", "at most 64"),
    # resources
    "quantity": (spec(resources={"limits": {"memory": "lots"}}), "spec.resources.limits.memory", "should match"),
    "negative quantity": (spec(resources={"limits": {"cpu": "-1"}}), "spec.resources.limits.cpu", "should match"),
    "negative number": (spec(resources={"limits": {"cpu": -1}}), "spec.resources.limits.cpu", "greater than or equal"),
    "request above limit": (
        spec(resources={"requests": {"memory": "2Gi"}, "limits": {"memory": "1500Mi"}}),
        "spec.resources.requests", "above the limit",
    ),
    # volumes
    "volume name": (volume(name="Data_1"), "spec.volumes[0].name", "DNS label"),
    "reserved volume name": (volume(name="trainyard-runtime"), "spec.volumes[0].name", "reserved"),
    "volume without source": (volume(emptyDir=None), "spec.volumes[0]", "exactly one of emptyDir"),
    "volume with two": (volume(persistentVolumeClaim=CLAIM), "spec.volumes[0]", "exactly one of emptyDir"),
    "no mountPath": (volume(mountPath=None), "spec.volumes[0].mountPath", "Required"),
    "same mountPath": (
        spec(volumes=[{"name": n, "mountPath": "/a", "emptyDir": {}} for n in "xy"]), "spec.volumes", "the same mountPath",
    ),
    "same name": (
        spec(volumes=[{"name": "x", "mountPath": f"/{n}", "emptyDir": {}} for n in "ab"]),
        "spec.volumes[1]", "Duplicate value",
    ),
    "subPath": (volume(subPath="a/../../etc"), "spec.volumes[0].subPath", "without '..'"),
    "absolute subPath": (volume(subPath="/etc"), "spec.volumes[0].subPath", "relative path"),
    "item path": (
        volume(emptyDir=None, configMap={"name": "a", "items": [{"key": "a", "path": "../a"}]}),
        "spec.volumes[0].configMap.items[0].path", "without '..'",
    ),
    "secret item path": (
        volume(emptyDir=None, secret={"secretName": "a", "items": [{"key": "a", "path": "/a"}]}),
        "spec.volumes[0].secret.items[0].path", "relative path",
    ),
    "medium": (volume(emptyDir={"medium": "HugePages"}), "spec.volumes[0].emptyDir.medium", "Unsupported value"),
    "file mode": (
        volume(emptyDir=None, secret={"secretName": "a", "defaultMode": 512}),
        "spec.volumes[0].secret.defaultMode", "less than or equal to 511",
    ),
    # scheduling
    "toleration without key": (spec(tolerations=[{"operator": "Equal"}]), "spec.tolerations[0]", "operator Exists"),
    "toleration value": (
        spec(tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]), "spec.tolerations[0].value", "no value",
    ),
    "tolerationSeconds": (
        spec(tolerations=[{"key": "a", "effect": "NoSchedule", "tolerationSeconds": 1}]),
        "spec.tolerations[0].tolerationSeconds", "NoExecute",
    ),
    "effect": (spec(tolerations=[{"key": "a", "effect": "Never"}]), "spec.tolerations[0].effect", "Unsupported value"),
    "node label": (spec(nodeSelector={"a": "b c"}), "spec.nodeSelector.a", "should match"),
    "no topologyKey": (
        terms(topologyKey=""),
        "spec.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].topologyKey", "at least 1 chars",
    ),
    "priority class": (spec(priorityClassName="High!"), "spec.priorityClassName", "name of a PriorityClass"),
    "system's priority": (spec(priorityClassName="system-node-critical"), "spec.priorityClassName", "not be one of the"),
    "service account": (spec(serviceAccountName="a/b"), "spec.serviceAccountName", "name of a ServiceAccount"),
    # checkpoints
    "uri scheme": (checkpoint(uri="gs://bucket/a"), "spec.checkpoint.uri", "must be s3://bucket"),
    "bucket": (checkpoint(uri="s3://My_Bucket/a"), "spec.checkpoint.uri", "3 to 63 lower-case letters"),
    "no bucket": (checkpoint(uri="s3:///a"), "spec.checkpoint.uri", "3 to 63 lower-case letters"),
    "credentials in uri": (checkpoint(uri="s3://AKIA:key@bucket/a"), "spec.checkpoint.uri", "credentialsSecret"),
    "query in uri": (checkpoint(uri="s3://bucket/a?x=y"), "spec.checkpoint.uri", "must not contain"),
    "fragment in uri": (checkpoint(uri="s3://bucket/a#b"), "spec.checkpoint.uri", "must not contain"),
    ".. in uri": (checkpoint(uri="s3://bucket/a/../b"), "spec.checkpoint.uri", "'.' or '..' parts"),
    ". at the end": (checkpoint(uri="s3://bucket/a/."), "spec.checkpoint.uri", "'.' or '..' parts"),
    "// in uri": (checkpoint(uri="s3://bucket//a"), "spec.checkpoint.uri", "'//' in its path"),
    "relative file": (checkpoint(uri="file://ckpt/a"), "spec.checkpoint.uri", "file:///absolute/path"),
    "root as file": ({**checkpoint(uri="file:///"), **spec(volumes=SHARED)}, "spec.checkpoint.uri", "needs a path"),
    "file on no volume": (checkpoint(uri="file:///ckpt/a"), "spec.checkpoint.uri", "mount a persistentVolumeClaim"),
    "file beside the volume": (
        {**checkpoint(uri="file:///ckpt2"), **spec(volumes=SHARED)}, "spec.checkpoint.uri", "mount a persistentVolumeClaim",
    ),
    "file on an emptyDir": (
        {**checkpoint(uri="file:///data/a"), **volume()}, "spec.checkpoint.uri", "mount a persistentVolumeClaim",
    ),
    "file on a read-only claim": (
        {**checkpoint(uri="file:///ckpt/a"), **spec(volumes=[SHARED[0] | {"readOnly": True}])},
        "spec.checkpoint.uri", "not readOnly",
    ),
    "endpoint": (checkpoint(endpoint="minio:9000"), "spec.checkpoint.endpoint", "http(s)://host"),
    "endpoint's password": (checkpoint(endpoint="https://a:b@minio"), "spec.checkpoint.endpoint", "without user"),
    "endpoint's query": (checkpoint(endpoint="https://minio/?a=b"), "spec.checkpoint.endpoint", "without user"),
    "endpoint of a file": (
        {**checkpoint(uri="file:///ckpt", endpoint="https://minio"), **spec(volumes=SHARED)},
        "spec.checkpoint.endpoint", "remove it",
    ),
    "region of a file": (
        {**checkpoint(uri="file:///ckpt", region="eu-central-1"), **spec(volumes=SHARED)},
        "spec.checkpoint.region", "remove it",
    ),
    "credentials of a file": (
        {**checkpoint(uri="file:///ckpt", credentialsSecret={"name": "s3"}), **spec(volumes=SHARED)},
        "spec.checkpoint.credentialsSecret", "remove it",
    ),
    "region": (checkpoint(region="EU Central"), "spec.checkpoint.region", "should match"),
    "interval.steps": (checkpoint(interval={"steps": 0}), "spec.checkpoint.interval.steps", "greater than or equal to 1"),
    "interval.seconds": (
        checkpoint(interval={"seconds": 604801}), "spec.checkpoint.interval.seconds", "less than or equal to 604800",
    ),
    "auto and steps": (
        checkpoint(interval={"auto": True, "steps": 5}), "spec.checkpoint.interval.auto", "remove steps and seconds",
    ),
    "auto and seconds": (
        checkpoint(interval={"auto": True, "seconds": 5}), "spec.checkpoint.interval.auto", "remove steps and seconds",
    ),
    "keepBest without metric": (checkpoint(keepBest={}), "spec.checkpoint.keepBest.metric", "Required"),
    "metric with a colon": (
        checkpoint(keepBest={"metric": "a:min"}), "spec.checkpoint.keepBest.metric", "without ':' and spaces",
    ),
    "keepBest.mode": (
        checkpoint(keepBest={"metric": "a", "mode": "best"}), "spec.checkpoint.keepBest.mode", '"min", "max"',
    ),
    "keepBest.count": (
        checkpoint(keepBest={"metric": "a", "count": 0}), "spec.checkpoint.keepBest.count", "greater than or equal to 1",
    ),
    "resume": (checkpoint(resume="sometimes"), "spec.checkpoint.resume", "never, auto, required or the number"),
    "resume from nothing": (checkpoint(resume=""), "spec.checkpoint.resume", "never, auto, required or the number"),
    "resume from a negative step": (checkpoint(resume=-1), "spec.checkpoint.resume", "greater than or equal to 0"),
    "resume from too far": (checkpoint(resume=10**12), "spec.checkpoint.resume", "less than or equal to 999999999999"),
    "resume by a truth": (checkpoint(resume=True), "spec.checkpoint.resume", "must be of type"),
    "too many copies": (checkpoint(local={"copies": 4}), "spec.checkpoint.local.copies", "less than or equal to 3"),
    "copies on no other node": (
        checkpoint(local={"copies": 2}), "spec.checkpoint.local.copies", "must be less than nodes",
    ),
    "copies of nothing": (
        checkpoint(local={"enabled": False, "copies": 1}), "spec.checkpoint.local.copies", "set local.enabled",
    ),
    "local.medium": (checkpoint(local={"medium": "HugePages"}), "spec.checkpoint.local.medium", "Unsupported value"),
    "local.sizeLimit": (checkpoint(local={"sizeLimit": "lots"}), "spec.checkpoint.local.sizeLimit", "should match"),
    "deletionPolicy": (checkpoint(deletionPolicy="Orphan"), "spec.checkpoint.deletionPolicy", '"Retain", "Delete"'),
    "determinism": (spec(determinism="strict"), "spec.determinism", "Unsupported value"),
    "elastic without virtual ranks": (spec(determinism="elastic"), "spec.virtualRanks", "needs virtualRanks"),
    "virtual ranks alone": (spec(virtualRanks=4), "spec.virtualRanks", "goes with determinism elastic only"),
    "virtual ranks without determinism": (
        spec(determinism="", virtualRanks=4), "spec.virtualRanks", "goes with determinism elastic only",
    ),
    "fewer virtual ranks than processes": (
        spec(determinism="elastic", virtualRanks=3, processesPerNode=2), "spec.virtualRanks", "must not be below",
    ),
    "no virtual rank": (
        spec(determinism="elastic", virtualRanks=0), "spec.virtualRanks", "greater than or equal to 1",
    ),
    "keep": (checkpoint(keep=1), "spec.checkpoint.keep", "greater than or equal to 2"),
    # restarts
    "negative restarts": (
        spec(restartPolicy={"maxRestarts": -1}), "spec.restartPolicy.maxRestarts", "greater than or equal to 0",
    ),
    "no attempt without progress": (
        spec(restartPolicy={"noProgressLimit": 0}), "spec.restartPolicy.noProgressLimit", "greater than or equal to 1",
    ),
    "back-off above its maximum": (
        spec(restartPolicy={"backoffSeconds": 30, "backoffMaxSeconds": 10}),
        "spec.restartPolicy.backoffMaxSeconds", "must not be below",
    ),
    "back-off above the default maximum": (
        spec(restartPolicy={"backoffSeconds": 61}), "spec.restartPolicy.backoffMaxSeconds", "must not be below",
    ),
    "string for a number": (spec(processesPerNode="2"), "spec.processesPerNode", "must be of type integer"),
}  # fmt: skip

RESERVED_NAMES = [*RESERVED_ENV, *(f"{prefix}ANYTHING" for prefix in RESERVED_ENV_PREFIXES)]
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "GITHUB_TOKEN", "WANDB_API_KEY",
    "DB_PASSWORD", "db_password", "PASSWD", "CLIENT_SECRET", "MY_CREDENTIALS", "SSH_PRIVATE_KEY",
)  # fmt: skip
RESERVED_PATHS = (
    "/trainyard", "/trainyard/x", "/trainyard-script", "/trainyard-script/x", "/var/run/trainyard/token",
    "/var/run/secrets", "/var/run/secrets/kubernetes.io/serviceaccount", "/run/secrets/x", "/var/run", "/run",
    "/var", "/proc", "/proc/self", "/sys", "/sys/fs", "/dev", "/dev/shm",  # noqa: S108
)  # fmt: skip
BAD_PATHS = ("data", "", "/", "/a:b", "/a/../b", "/..", "/a/./b", "//a", "/a//b", "/a/", "/a\nb")

# Fields that a pod has and a run never will: each would give its author more than a restricted pod of the namespace.
UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "top level": ({"extra": 1}, "extra"),
    "typo": (spec(imagee="a"), "spec.imagee"),
    "hostNetwork": (spec(hostNetwork=True), "spec.hostNetwork"),
    "hostPID": (spec(hostPID=True), "spec.hostPID"),
    "hostIPC": (spec(hostIPC=True), "spec.hostIPC"),
    "securityContext": (spec(securityContext={"privileged": True}), "spec.securityContext"),
    "nodeName": (spec(nodeName="control-plane"), "spec.nodeName"),
    "runtimeClassName": (spec(runtimeClassName="x"), "spec.runtimeClassName"),
    "initContainers": (spec(initContainers=[]), "spec.initContainers"),
    "podTemplate": (spec(podTemplate={"spec": {}}), "spec.podTemplate"),
    "hostPath": (volume(hostPath={"path": "/"}), "spec.volumes[0].hostPath"),
    "projected": (volume(projected={"sources": []}), "spec.volumes[0].projected"),
    "csi": (volume(csi={"driver": "x"}), "spec.volumes[0].csi"),
    "mountPropagation": (volume(mountPropagation="Bidirectional"), "spec.volumes[0].mountPropagation"),
    "namespace of a ConfigMap": (
        spec(script={"configMap": {"name": "a", "namespace": "kube-system"}}), "spec.script.configMap.namespace",
    ),
    "namespace of a Secret": (
        env("A", valueFrom={"secretKeyRef": {"name": "a", "key": "b", "namespace": "kube-system"}}),
        "spec.env[0].valueFrom.secretKeyRef.namespace",
    ),
    "namespace of the credentials": (
        checkpoint(credentialsSecret={"name": "a", "namespace": "kube-system"}), "spec.checkpoint.credentialsSecret.namespace",
    ),
    "namespaces of pods": (
        terms(namespaces=["kube-system"]),
        "spec.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].namespaces",
    ),
    "namespaceSelector": (
        terms(namespaceSelector={}),
        "spec.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].namespaceSelector",
    ),
}  # fmt: skip


def refusal(server: Server, changes: dict[str, Any]) -> list[tuple[str, str]]:
    """(field, message) of each complaint about a good run with these changes."""
    path = RUNS.format(namespace="default")
    answer = server.request("POST", path, training_run(changes), query=DRY_RUN)
    assert answer.code == 422, (answer.code, answer.message)
    return answer.causes


def assert_refused(causes: list[tuple[str, str]], field: str, text: str) -> None:
    assert any(f == field and text in m for f, m in causes), causes


@pytest.mark.parametrize("case", REFUSED)
def test_refused(server: Server, case: str) -> None:
    changes, field, text = REFUSED[case]
    assert_refused(refusal(server, changes), field, text)


@pytest.mark.parametrize("name", RESERVED_NAMES)
def test_reserved_env_is_refused(server: Server, name: str) -> None:
    assert_refused(refusal(server, env(name, value="x")), "spec.env[0].name", "reserved")


@pytest.mark.parametrize("name", CREDENTIALS)
def test_literal_credentials_are_refused(server: Server, name: str) -> None:
    causes = refusal(server, env(name, value="canary-f00"))
    assert_refused(causes, "spec.env[0].value", "valueFrom.secretKeyRef")
    assert "canary-f00" not in str(causes), "the answer repeats the credential"


@pytest.mark.parametrize("path", RESERVED_PATHS)
def test_mounts_over_what_we_use_are_refused(server: Server, path: str) -> None:
    assert_refused(refusal(server, volume(mountPath=path)), "spec.volumes[0].mountPath", "used by Trainyard")


@pytest.mark.parametrize("path", BAD_PATHS)
def test_mount_paths_that_are_none_are_refused(server: Server, path: str) -> None:
    assert_refused(
        refusal(server, volume(mountPath=path)), "spec.volumes[0].mountPath", "must be an absolute path"
    )


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_fields_are_refused(server: Server, case: str) -> None:
    """As `kubectl apply` asks for it."""
    changes, field = UNKNOWN[case]
    answer = server.request("POST", RUNS.format(namespace="default"), training_run(changes), query=DRY_RUN)
    assert answer.code == 400
    assert f'unknown field "{field}"' in answer.message


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_fields_are_dropped_when_not_refused(server: Server, case: str) -> None:
    """A client that does not ask for validation gets a warning, and nothing of it is stored."""
    changes, field = UNKNOWN[case]
    query = {"dryRun": "All", "fieldValidation": "Warn"}
    answer = server.request("POST", RUNS.format(namespace="default"), training_run(changes), query=query)
    assert answer.code == 201, answer.message
    assert any(field in warning for warning in answer.warnings)
    leaf = field.rpartition(".")[2]
    assert f"'{leaf}'" not in str({k: v for k, v in answer.body.items() if k != "metadata"})
