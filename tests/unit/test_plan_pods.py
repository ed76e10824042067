"""The pod that is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.builders import SETTINGS, a_run
from trainyard.checkpoint.config import CheckpointConfig, KeepBest
from trainyard_api import contract
from trainyard_operator.observe import controlled_by, pod_view
from trainyard_operator.plan.pods import desired_pod


def pod(run=None, index: int = 1, attempt: int = 3) -> dict[str, Any]:
    return desired_pod((run or a_run()).with_status({"attempt": attempt}).build(), index, SETTINGS)


def env(body: dict[str, Any]) -> dict[str, Any]:
    listed = body["spec"]["containers"][0]["env"]
    assert len({v["name"] for v in listed}) == len(listed)
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in listed}


def test_identity() -> None:
    body = pod()
    meta = body["metadata"]
    assert (meta["name"], meta["namespace"]) == ("demo-1-3", "team")
    (owner,) = meta["ownerReferences"]
    assert owner["uid"] == a_run().uid and owner["controller"] is True and owner["blockOwnerDeletion"] is True
    assert controlled_by(body, a_run().uid)
    view = pod_view(body)
    assert (view.index, view.created_in) == (1, 3)
    assert meta["labels"][contract.LABEL_RUN] == "demo"
    assert meta["labels"][contract.LABEL_RUN_UID] == a_run().uid


def test_pod_security_restricted() -> None:
    """kubernetes.io/docs/concepts/security/pod-security-standards, profile "restricted", field by field."""
    spec = pod()["spec"]
    (container,) = spec["containers"]
    context = container["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 65532
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC", "subdomain"} & set(spec)
    allowed = {"configMap", "emptyDir", "projected", "secret", "persistentVolumeClaim"}
    assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"])
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert spec["restartPolicy"] == "Never"


def test_the_contracts_environment() -> None:
    run = a_run().with_spec(args=["--lr", "$(HOME)", "$$(A)$"], preload=["numpy", "math"], processesPerNode=4)
    said = env(pod(run))
    literal = said["TRAINYARD_COMMAND"]
    assert literal.count("$") == 2 * 4  # the kubelet makes $ of $$ and expands nothing
    assert json.loads(literal.replace("$$", "$")) == ["train.py", "--lr", "$(HOME)", "$$(A)$"]
    assert said["TRAINYARD_PRELOAD"] == "numpy,math"
    assert (said["TRAINYARD_NODE_INDEX"], said["TRAINYARD_PROCS_PER_NODE"]) == ("1", "4")
    assert said["TRAINYARD_POD_UID"] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert said["TRAINYARD_COORDINATOR_URL"] == SETTINGS.coordinator_url
    assert said["HOME"] == "/tmp"  # noqa: S108
    assert said["TRAINYARD_CHECKPOINT_URI"] == "s3://bucket/demo"
    assert all(isinstance(v, str | dict) for v in said.values())


def test_what_the_spec_says_of_checkpoints_reaches_the_library() -> None:
    """By the names that the library itself reads, and with what it understands."""
    checkpoint = {
        "uri": "s3://b/p",
        "endpoint": "http://minio:9000",
        "region": "eu-central-1",
        "interval": {"auto": True},
        "onException": True,
        "keep": 5,
        "keepBest": {"metric": "val/loss", "mode": "max", "count": 2},
        "resume": 120,
        "local": {"copies": 1},
    }
    said = env(pod(a_run().with_spec(checkpoint=checkpoint, determinism="elastic", virtualRanks=8)))
    read = CheckpointConfig.from_env({k: v for k, v in said.items() if isinstance(v, str)})
    assert read == CheckpointConfig(
        uri="s3://b/p",
        endpoint="http://minio:9000",
        region="eu-central-1",
        auto=True,
        on_exception=True,
        keep=5,
        keep_best=KeepBest(metric="val/loss", mode="max", count=2),
        resume="120",
        local=True,
        copies=1,
        run=a_run().uid,
    )
    assert (said["TRAINYARD_DETERMINISM"], said["TRAINYARD_VIRTUAL_RANKS"]) == ("elastic", "8")


def test_what_the_spec_does_not_say_of_checkpoints_is_the_librarys_default() -> None:
    said = env(pod())
    read = CheckpointConfig.from_env({k: v for k, v in said.items() if isinstance(v, str)})
    assert read == CheckpointConfig(uri="s3://bucket/demo", local=True, run=a_run().uid)
    assert not {name for name in said if name in ("TRAINYARD_DETERMINISM", "TRAINYARD_VIRTUAL_RANKS")}
    off = a_run().with_spec(checkpoint={"uri": "s3://b/p", "local": {"enabled": False}}, determinism="")
    assert env(pod(off))["TRAINYARD_CHECKPOINT_LOCAL"] == "0"
    assert "TRAINYARD_DETERMINISM" not in env(pod(off))


@pytest.mark.parametrize(
    ("local", "volume"),
    [
        ({}, {}),
        ({"medium": ""}, {}),
        ({"medium": "Memory", "sizeLimit": "8Gi"}, {"medium": "Memory", "sizeLimit": "8Gi"}),
        ({"enabled": False, "sizeLimit": 1000}, {"sizeLimit": "1000"}),
    ],
)
def test_checkpoints_are_staged_in_a_volume_as_the_spec_says(
    local: dict[str, Any], volume: dict[str, Any]
) -> None:
    body = pod(a_run().with_spec(checkpoint={"uri": "s3://b/p", "local": local}))
    (runtime,) = [v for v in body["spec"]["volumes"] if v["name"] == "trainyard-runtime"]
    assert runtime["emptyDir"] == volume


def test_credentials_are_named_never_held() -> None:
    run = a_run().with_spec(checkpoint={"uri": "s3://b/p", "credentialsSecret": {"name": "s3"}})
    said = env(pod(run))
    assert said["AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "s3", "key": "AWS_ACCESS_KEY_ID"}}
    assert said["AWS_SESSION_TOKEN"]["secretKeyRef"]["optional"] is True
    assert "AWS_ACCESS_KEY_ID" not in env(pod())


def test_the_users_variables_never_replace_ours() -> None:
    theirs = [
        {"name": "TRAINYARD_NODE_INDEX", "value": "9"},
        {"name": "RANK", "value": "9"},
        {"name": "AWS_ACCESS_KEY_ID", "value": "9"},
        {"name": "HOME", "value": "/data"},
        {"name": "LR", "value": "0.1"},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}},
    ]
    run = a_run().with_spec(env=theirs, checkpoint={"uri": "s3://b/p", "credentialsSecret": {"name": "s3"}})
    said = env(pod(run))
    assert said["TRAINYARD_NODE_INDEX"] == "1" and "RANK" not in said
    assert isinstance(said["AWS_ACCESS_KEY_ID"], dict)
    assert (said["HOME"], said["LR"]) == ("/data", "0.1") and isinstance(said["KEY"], dict)


def test_the_script_is_mounted_with_its_one_key() -> None:
    run = a_run().with_spec(
        command=None, script={"configMap": {"name": "code", "key": "main.py"}}, args=["-v"]
    )
    body = pod(run)
    assert json.loads(env(body)["TRAINYARD_COMMAND"]) == [f"{contract.SCRIPT_DIR}/main.py", "-v"]
    volume = next(v for v in body["spec"]["volumes"] if v["name"] == "trainyard-script")
    assert volume["configMap"] == {"name": "code", "items": [{"key": "main.py", "path": "main.py"}]}


def test_every_mount_has_its_volume_and_every_path_one_mount() -> None:
    volumes = [
        {"name": "data", "mountPath": "/data", "persistentVolumeClaim": {"claimName": "d"}, "readOnly": True},
        {"name": "scratch", "mountPath": "/scratch", "emptyDir": {"sizeLimit": "1Gi"}, "subPath": "x"},
    ]
    body = pod(a_run().with_spec(volumes=volumes))
    mounts = body["spec"]["containers"][0]["volumeMounts"]
    names = [v["name"] for v in body["spec"]["volumes"]]
    assert len(set(names)) == len(names) and {m["name"] for m in mounts} == set(names)
    paths = [m["mountPath"] for m in mounts]
    assert len(set(paths)) == len(paths)
    assert {"/trainyard", "/tmp", "/dev/shm", contract.TOKEN_DIR, "/data", "/scratch"} == set(paths)  # noqa: S108
    assert next(m for m in mounts if m["name"] == "data")["readOnly"] is True
    assert next(m for m in mounts if m["name"] == "scratch")["subPath"] == "x"


@pytest.mark.parametrize(("limits", "size"), [({}, "2Gi"), ({"memory": "8Gi"}, "8Gi")])
def test_shared_memory_is_bounded(limits: dict[str, str], size: str) -> None:
    body = pod(a_run().with_spec(resources={"limits": limits}))
    shm = next(v for v in body["spec"]["volumes"] if v["name"] == "trainyard-shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": size}


def test_the_token_has_its_own_audience() -> None:
    volume = next(v for v in pod()["spec"]["volumes"] if v["name"] == "trainyard-token")
    (source,) = volume["projected"]["sources"]
    assert source["serviceAccountToken"] == {
        "audience": contract.TOKEN_AUDIENCE,
        "expirationSeconds": 3600,
        "path": "token",
    }


@pytest.mark.parametrize(
    ("theirs", "seconds"),
    [
        ([], {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}),
        (
            [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30},
        ),
        (
            [
                {
                    "key": "node.kubernetes.io/not-ready",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": 5,
                }
            ],
            {"node.kubernetes.io/not-ready": 5, "node.kubernetes.io/unreachable": 30},
        ),
        ([{"operator": "Exists"}], {}),
    ],
)
def test_dead_nodes_are_left_soon_unless_the_user_says_otherwise(
    theirs: list[Any], seconds: dict[str, int]
) -> None:
    listed = pod(a_run().with_spec(tolerations=theirs))["spec"]["tolerations"]
    assert {t["key"]: t["tolerationSeconds"] for t in listed if "tolerationSeconds" in t} == seconds
    assert listed[: len(theirs)] == theirs


def test_what_the_user_may_say_about_scheduling_is_passed_on() -> None:
    run = a_run().with_spec(
        nodeSelector={"gpu": "a100"},
        affinity={"podAntiAffinity": {}},
        priorityClassName="high",
        serviceAccountName="trainer",
        terminationGracePeriodSeconds=90,
        imagePullSecrets=[{"name": "reg"}],
        imagePullPolicy="Always",
        workingDir="/srv",
        envFrom=[{"secretRef": {"name": "e"}}],
        resources={"requests": {"cpu": 1}, "limits": {"nvidia.com/gpu": 1}},
    )
    spec = pod(run)["spec"]
    (container,) = spec["containers"]
    assert spec["nodeSelector"] == {"gpu": "a100"} and spec["affinity"] == {"podAntiAffinity": {}}
    assert (spec["priorityClassName"], spec["serviceAccountName"]) == ("high", "trainer")
    assert spec["terminationGracePeriodSeconds"] == 90 and spec["imagePullSecrets"] == [{"name": "reg"}]
    assert (container["imagePullPolicy"], container["workingDir"]) == ("Always", "/srv")
    assert container["envFrom"] == [{"secretRef": {"name": "e"}}]
    assert container["resources"] == {"requests": {"cpu": 1}, "limits": {"nvidia.com/gpu": 1}}
    assert container["command"] == ["python3", "-m", "trainyard_agent"]


def test_long_names_stay_valid_labels() -> None:
    body = desired_pod(a_run("a" * 60 + "-.bcd").with_status({"attempt": 1}).build(), 0, SETTINGS)
    value = body["metadata"]["labels"][contract.LABEL_RUN]
    assert len(value) <= 63 and value[-1].isalnum()


def test_pods_prefer_a_node_each_unless_the_user_places_them() -> None:
    (spread,) = pod()["spec"]["topologySpreadConstraints"]
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway", "a cluster of one node must do as well"
    assert spread["labelSelector"]["matchLabels"].items() <= pod()["metadata"]["labels"].items()
    placed = pod(a_run().with_spec(affinity={"nodeAffinity": {}}))
    assert "topologySpreadConstraints" not in placed["spec"]
