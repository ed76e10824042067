"""What the API accepts, and what it stores: defaults come from the schema, and our dataclasses can read it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.control_plane.manifests import REMOVE, checkpoint, env, spec, terms, training_run, volume
from tests.control_plane.server import RUNS, Server
from trainyard_api.serde import encode
from trainyard_api.v1alpha1 import TrainingRun

SHARED = {"name": "ckpt", "mountPath": "/ckpt", "persistentVolumeClaim": {"claimName": "shared"}}
EXPRESSION = {"key": "zone", "operator": "In", "values": ["a", "b"]}

ACCEPTED: dict[str, dict[str, Any]] = {
    "minimal": {},
    "longest name": {"metadata.name": "a" * 40},
    "name that begins with a digit": {"metadata.name": "7b-run"},
    "max equals min": spec(nodes={"min": 4, "max": 4}),
    "largest world": spec(nodes={"min": 1024}, processesPerNode=4),
    "file in the image": spec(script=REMOVE, command=["/app/train.py", "--lr=1e-3"], args=["--epochs", "3"]),
    "module": spec(script=REMOVE, command=["-m", "mypackage.train"], workingDir="/app", preload=["numpy", "torch.nn"]),
    "script with args": spec(args=["--seed=1", "", "ü"]),
    "env": spec(
        env=[
            {"name": "EMPTY"},
            {"name": "ALSO_EMPTY", "value": ""},
            {"name": "OMP_NUM_THREADS", "value": "4"},
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
            {"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "level", "optional": True}}},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        envFrom=[{"configMapRef": {"name": "a"}}, {"prefix": "S_", "secretRef": {"name": "b", "optional": True}}],
    ),
    "names that only look like credentials": spec(
        env=[
            {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
            {"name": "MAX_TOKENS", "value": "4096"},
            {"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": "/var/aws/token"},
            {"name": "AWS_REGION", "value": "eu-central-1"},
            {"name": "MONKEY", "value": "x"},
            {"name": "RANKING", "value": "x"},
        ]
    ),
    "literal empty credential": env("AWS_ACCESS_KEY_ID", value=""),
    "resources": spec(
        resources={
            "requests": {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "10G"},
            "limits": {"cpu": 1, "memory": "1024Mi", "nvidia.com/gpu": 8},
        }
    ),
    "volumes of all kinds": spec(
        volumes=[
            SHARED | {"subPath": "runs/a", "readOnly": True},
            {"name": "scratch", "mountPath": "/scratch/a", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
            {
                "name": "config", "mountPath": "/home/user/.config",
                "configMap": {"name": "c", "items": [{"key": "a", "path": "x/a.yaml", "mode": 0o444}], "optional": True},
            },
            {"name": "keys", "mountPath": "/var/keys", "secret": {"secretName": "s", "defaultMode": 0o400}},
        ]
    ),
    "scheduling": spec(
        nodeSelector={"gpu.example/model": "h100", "empty": ""},
        tolerations=[
            {"operator": "Exists"},
            {"key": "gpu", "value": "yes", "effect": "NoSchedule"},
            {"key": "gone", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30},
        ],
        priorityClassName="batch.low",
        serviceAccountName="trainer",
        imagePullPolicy="Always",
        imagePullSecrets=[{"name": "registry"}],
    ),
    "node affinity": spec(
        affinity={
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [EXPRESSION, {"key": "cores", "operator": "Gt", "values": ["7"]}]},
                        {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-1"]}]},
                    ]
                },
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 100, "preference": {"matchExpressions": [{"key": "ssd", "operator": "Exists"}]}}
                ],
            },
            "podAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 1, "podAffinityTerm": {"topologyKey": "rack", "labelSelector": {"matchLabels": {"a": "b"}}}}
                ]
            },
        }
    ),
    "one node a machine": terms(labelSelector={"matchExpressions": [{"key": "trainyard.dev/run", "operator": "Exists"}]}),
    "bucket alone": checkpoint(uri="s3://bucket"),
    "all of s3": checkpoint(
        endpoint="http://minio.storage.svc:9000", region="eu-central-1", keep=2,
        interval={"steps": 100, "seconds": 60}, credentialsSecret={"name": "s3"},
    ),
    "interval by itself": checkpoint(interval={"auto": True}),
    "interval not by itself": checkpoint(interval={"auto": False, "steps": 5, "seconds": 60}),
    "all of what is kept": checkpoint(
        keepBest={"metric": "val/loss.é", "mode": "max", "count": 5}, onException=True, deletionPolicy="Delete",
        local={"enabled": True, "copies": 1, "medium": "Memory", "sizeLimit": "20Gi"},
    ),
    "nothing local": checkpoint(local={"enabled": False, "copies": 0, "medium": "", "sizeLimit": 10**9}),
    "resume from a step": checkpoint(resume=120),
    "resume from a step in quotes": checkpoint(resume="120"),
    "resume from the beginning": checkpoint(resume="never"),
    "resume or fail": checkpoint(resume="required"),
    "elastic": spec(determinism="elastic", virtualRanks=2),
    "determinism left empty": spec(determinism=""),
    "endpoint of IPv6 with a path": checkpoint(uri="s3://my.bucket-1/a_b/c=d/e+f", endpoint="https://[fd00::1]:9000/s3"),
    "file on a claim": {**checkpoint(uri="file:///ckpt/team/a"), **spec(volumes=[SHARED])},
    "file at a claim's root": {**checkpoint(uri="file:///ckpt"), **spec(volumes=[SHARED])},
    "lifetime": spec(
        suspend=True, activeDeadlineSeconds=3600, ttlSecondsAfterFinished=0, terminationGracePeriodSeconds=120,
        restartPolicy={"maxRestarts": 0, "backoffSeconds": 0, "backoffMaxSeconds": 0},
    ),
    "somebody else's": spec(managedBy="kueue.x-k8s.io/multikueue"),
    "a /tmp of one's own": volume(mountPath="/tmp", emptyDir={"sizeLimit": "1Gi"}),  # noqa: S108
    "mount of a name with dots": volume(mountPath="/data/..2024/a.b"),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(server: Server, case: str) -> None:
    query = {"dryRun": "All", "fieldValidation": "Strict"}
    sent = training_run(ACCEPTED[case])
    answer = server.request("POST", RUNS.format(namespace="default"), sent, query=query)
    assert (answer.code, answer.warnings) == (201, ()), answer.body
    for field, value in sent["spec"].items():
        assert _within(value, answer.body["spec"][field]), field
    read = TrainingRun.from_object(answer.body)
    assert _within(_without_empty(encode(read.spec)), answer.body["spec"]), (
        "the dataclasses say something else"
    )


def test_defaults(namespace: str, server: Server) -> None:
    """Stored, so that a later version with other defaults changes no run that exists."""
    stored = server.create(RUNS.format(namespace=namespace), training_run())
    assert stored["spec"] == {
        "image": "registry.example/trainer:1",
        "nodes": {"min": 2},
        "script": {"configMap": {"name": "digits", "key": "train.py"}},
        "checkpoint": {
            "uri": "s3://bucket/runs",
            "interval": {"auto": False},
            "onException": False,
            "keep": 3,
            "resume": "auto",
            "local": {"enabled": True, "copies": 0},
            "deletionPolicy": "Retain",
        },
        "processesPerNode": 1,
        "terminationGracePeriodSeconds": 30,
        "suspend": False,
        "managedBy": "trainyard.dev/operator",
        "restartPolicy": {
            "maxRestarts": 10,
            "maxInfrastructureRestarts": 100,
            "noProgressLimit": 3,
            "backoffSeconds": 1,
            "backoffMaxSeconds": 60,
            "startTimeoutSeconds": 600,
        },
    }


def _within(part: Any, whole: Any) -> bool:
    """Whether `whole` has all of `part`, defaults beside it aside."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and _within(v, whole[k]) for k, v in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(_within, part, whole))
    return bool(part == whole)


def _without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    """Without lists and objects that are empty: the API stores none for them."""
    plain = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in fields.items()}
    return {k: v for k, v in plain.items() if v not in ({}, [])}
