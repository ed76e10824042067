"""The desired pod. Closed list of fields: there is no raw pod template (design part 8).

Pods are never patched: a new version of the operator gives its changes to the pods that it creates.
"""

from __future__ import annotations

from typing import Any

from trainyard_api import contract
from trainyard_api.v1alpha1 import Spec, TrainingRun, Volume
from trainyard_operator.plan.environment import container_env
from trainyard_operator.plan.model import PlanSettings
from trainyard_operator.plan.names import label_value, pod_name

USER_ID = 65532
"""uid, gid and fsGroup of the workers ("nonroot" of distroless images)."""
UNREACHABLE_SECONDS = 30
"""How long a pod stays bound to a node that is not ready. Kubernetes' default is 300; agents are missed after
10 s, and their replacement does not wait for this."""
DEFAULT_SHM = "2Gi"
"""Size of /dev/shm when the container has no memory limit (DataLoader workers pass batches through it)."""
SHM_DIR = "/dev/shm"  # noqa: S108 - a path in the pod
TMP_DIR = "/tmp"  # noqa: S108 - a path in the pod
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
}
"""With POD_SECURITY: Pod Security `restricted`, and a read-only root."""


def desired_pod(run: TrainingRun, index: int, settings: PlanSettings) -> dict[str, Any]:
    """The pod with node index `index` for the run's current attempt."""
    spec, attempt = run.spec, run.status.attempt
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod_name(run.name, index, attempt),
            "namespace": run.namespace,
            "labels": _labels(run, index, attempt),
            "annotations": {"kubectl.kubernetes.io/default-container": contract.CONTAINER},
            "ownerReferences": [owned_by(run)],
        },
        "spec": without_none(
            {
                "restartPolicy": "Never",
                "enableServiceLinks": False,
                "automountServiceAccountToken": False,
                "serviceAccountName": spec.service_account_name,
                "terminationGracePeriodSeconds": spec.termination_grace_period_seconds,
                "priorityClassName": spec.priority_class_name,
                "nodeSelector": spec.node_selector or None,
                "affinity": spec.affinity,
                "topologySpreadConstraints": None if spec.affinity else [_one_a_node(run)],
                "tolerations": tolerations(spec),
                "imagePullSecrets": [{"name": ref.name} for ref in spec.image_pull_secrets] or None,
                "securityContext": POD_SECURITY,
                "volumes": _volumes(spec),
                "containers": [_container(run, index, settings)],
            }
        ),
    }


def _one_a_node(run: TrainingRun) -> dict[str, Any]:
    """A wish, not a condition: who asks for two nodes means two machines, but a laptop's cluster has one."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {contract.LABEL_RUN_UID: run.uid}},
    }


def owned_by(run: TrainingRun) -> dict[str, Any]:
    """The controlling ownerReference of every pod of a run: the garbage collector takes them with it."""
    return {
        "apiVersion": contract.API_VERSION,
        "kind": contract.KIND,
        "name": run.name,
        "uid": run.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def run_labels(run: TrainingRun, component: str) -> dict[str, str]:
    """Labels of every pod of a run."""
    return {
        contract.LABEL_NAME: contract.MANAGED_BY,
        contract.LABEL_COMPONENT: component,
        contract.LABEL_MANAGED_BY: contract.MANAGED_BY,
        contract.LABEL_RUN: label_value(run.name),
        contract.LABEL_RUN_UID: run.uid,
    }


def _labels(run: TrainingRun, index: int, attempt: int) -> dict[str, str]:
    place = {contract.LABEL_NODE_INDEX: str(index), contract.LABEL_ATTEMPT: str(attempt)}
    return run_labels(run, contract.CONTAINER) | place


def _container(run: TrainingRun, index: int, settings: PlanSettings) -> dict[str, Any]:
    spec = run.spec
    return without_none(
        {
            "name": contract.CONTAINER,
            "image": spec.image,
            "imagePullPolicy": spec.image_pull_policy,
            "command": ["python3", "-m", "trainyard_agent"],
            "workingDir": spec.working_dir,
            "env": container_env(run, index, settings),
            "envFrom": spec.env_from or None,
            "resources": without_none(
                {"requests": spec.resources.requests or None, "limits": spec.resources.limits or None}
            ),
            "volumeMounts": _mounts(spec),
            "terminationMessagePath": contract.TERMINATION_LOG,
            "terminationMessagePolicy": "File",
            "securityContext": CONTAINER_SECURITY,
        }
    )


def _own_volumes(spec: Spec) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, source, mount) of what every pod has. A path that the user mounts himself is his."""
    shm = spec.resources.limits.get("memory", DEFAULT_SHM)
    token = {"audience": contract.TOKEN_AUDIENCE, "expirationSeconds": 3600, "path": "token"}
    own: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (
            "trainyard-token",
            {"projected": {"sources": [{"serviceAccountToken": token}]}},
            {"mountPath": contract.TOKEN_DIR, "readOnly": True},
        ),
        ("trainyard-runtime", {"emptyDir": _staging(spec)}, {"mountPath": contract.RUNTIME_DIR}),
        ("trainyard-tmp", {"emptyDir": {}}, {"mountPath": TMP_DIR}),
        ("trainyard-shm", {"emptyDir": {"medium": "Memory", "sizeLimit": str(shm)}}, {"mountPath": SHM_DIR}),
    ]
    if spec.script is not None:
        source = spec.script.config_map
        items = [{"key": source.key, "path": source.key}]
        own.append(
            (
                "trainyard-script",
                {"configMap": {"name": source.name, "items": items}},
                {"mountPath": contract.SCRIPT_DIR, "readOnly": True},
            )
        )
    taken = {v.mount_path.rstrip("/") for v in spec.volumes}
    return [volume for volume in own if volume[2]["mountPath"] not in taken]


def _staging(spec: Spec) -> dict[str, Any]:
    """The volume that checkpoints are staged in, and kept in as the local tier."""
    local = spec.checkpoint.local
    limit = local.size_limit
    return without_none({"medium": local.medium or None, "sizeLimit": None if limit is None else str(limit)})


def _volumes(spec: Spec) -> list[dict[str, Any]]:
    return [{"name": name, **source} for name, source, _ in _own_volumes(spec)] + user_volumes(spec)


def user_volumes(spec: Spec) -> list[dict[str, Any]]:
    return [{"name": volume.name, **_source(volume)} for volume in spec.volumes]


def _mounts(spec: Spec) -> list[dict[str, Any]]:
    return [{"name": name, **mount} for name, _, mount in _own_volumes(spec)] + user_mounts(spec)


def user_mounts(spec: Spec) -> list[dict[str, Any]]:
    return [
        without_none(
            {
                "name": volume.name,
                "mountPath": volume.mount_path,
                "subPath": volume.sub_path,
                "readOnly": volume.read_only or None,
            }
        )
        for volume in spec.volumes
    ]


def _source(volume: Volume) -> dict[str, Any]:
    sources = {
        "configMap": volume.config_map,
        "secret": volume.secret,
        "persistentVolumeClaim": volume.persistent_volume_claim,
        "emptyDir": volume.empty_dir,
    }
    chosen = {kind: source for kind, source in sources.items() if source is not None}
    return chosen or {"emptyDir": {}}


def tolerations(spec: Spec) -> list[dict[str, Any]]:
    """The user's, and short ones for dead nodes unless he speaks of them himself."""
    own = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": UNREACHABLE_SECONDS}
        for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    ]
    return list(spec.tolerations) + [
        t for t in own if not any(_covers(u, str(t["key"])) for u in spec.tolerations)
    ]


def _covers(toleration: dict[str, Any], key: str) -> bool:
    return toleration.get("key") in (key, None, "") and toleration.get("effect") in ("NoExecute", None, "")


def without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
