"""The pod that deletes the checkpoints of a run (`deletionPolicy: Delete`).

The operator has no access to the bucket; whoever wrote there may delete there: the run's image, with the
run's account, credentials and volumes, and the same `restricted` security as its other pods.
"""

from __future__ import annotations

import re
from typing import Any

from trainyard_api import contract
from trainyard_api.v1alpha1 import TrainingRun
from trainyard_operator.plan.environment import cleanup_env
from trainyard_operator.plan.pods import (
    CONTAINER_SECURITY,
    POD_SECURITY,
    TMP_DIR,
    owned_by,
    run_labels,
    tolerations,
    user_mounts,
    user_volumes,
    without_none,
)

WORK_SECONDS = 600
"""Longest life of one such pod."""
MARGIN_SECONDS = 30
"""So much before that the program stops by itself, and says how far it came."""
RESOURCES = {
    "requests": {"cpu": "100m", "memory": "128Mi"},
    "limits": {"cpu": "1", "memory": "512Mi"},  # both, for namespaces with a quota on limits
}


def cleanup_name(run: str, number: int) -> str:
    """`<run>-cleanup-<try>`: no name of another pod of the run, which all end in two numbers."""
    return f"{run}-cleanup-{number}"


def cleanup_number(run: str, pod: str) -> int | None:
    """The try that a pod is for; None if it is another kind of pod."""
    found = re.fullmatch(r"-cleanup-(\d{1,9})", pod.removeprefix(run)) if pod.startswith(run) else None
    return int(found[1]) if found else None


def cleanup_pod(run: TrainingRun, number: int) -> dict[str, Any]:
    """The pod of try `number`."""
    spec = run.spec
    taken = {v.mount_path.rstrip("/") for v in spec.volumes}
    scratch = [] if TMP_DIR in taken else [{"name": "trainyard-tmp", "emptyDir": {}}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": cleanup_name(run.name, number),
            "namespace": run.namespace,
            "labels": run_labels(run, contract.CLEANUP_CONTAINER),
            "ownerReferences": [owned_by(run)],
        },
        "spec": without_none(
            {
                "restartPolicy": "Never",
                "activeDeadlineSeconds": WORK_SECONDS,
                "terminationGracePeriodSeconds": 5,
                "enableServiceLinks": False,
                "automountServiceAccountToken": False,
                "serviceAccountName": spec.service_account_name,
                "priorityClassName": spec.priority_class_name,
                "nodeSelector": spec.node_selector or None,
                "affinity": spec.affinity,
                "tolerations": tolerations(spec),
                "imagePullSecrets": [{"name": ref.name} for ref in spec.image_pull_secrets] or None,
                "securityContext": POD_SECURITY,
                "volumes": scratch + user_volumes(spec),
                "containers": [
                    without_none(
                        {
                            "name": contract.CLEANUP_CONTAINER,
                            "image": spec.image,
                            "imagePullPolicy": spec.image_pull_policy,
                            "command": ["python3", "-m", "trainyard.checkpoint.delete"],
                            "args": ["--seconds", str(WORK_SECONDS - MARGIN_SECONDS)],
                            "env": cleanup_env(run),
                            "envFrom": spec.env_from or None,
                            "resources": RESOURCES,
                            "volumeMounts": [{"name": v["name"], "mountPath": TMP_DIR} for v in scratch]
                            + user_mounts(spec),
                            "terminationMessagePath": contract.TERMINATION_LOG,
                            "terminationMessagePolicy": "FallbackToLogsOnError",
                            "securityContext": CONTAINER_SECURITY,
                        }
                    )
                ],
            }
        ),
    }
