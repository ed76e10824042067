"""Environment of the trainer container: the contract's, the user's, and credentials by reference."""

from __future__ import annotations

import json
from typing import Any

from trainyard_api.contract import (
    RESERVED_ENV,
    RESERVED_ENV_PREFIXES,
    RUNTIME_DIR,
    SCRIPT_DIR,
    TOKEN_FILE,
    Env,
)
from trainyard_api.v1alpha1 import CheckpointSpec, EnvVar, Spec, TrainingRun
from trainyard_operator.plan.model import PlanSettings

CREDENTIALS = (("AWS_ACCESS_KEY_ID", False), ("AWS_SECRET_ACCESS_KEY", False), ("AWS_SESSION_TOKEN", True))
"""(key of the Secret and name of the variable, whether it may be missing)."""
HOME = "/tmp"  # noqa: S108 - the only writable home of a read-only root


def container_env(run: TrainingRun, index: int, settings: PlanSettings) -> list[dict[str, Any]]:
    """All variables. The user's come first and never replace one of ours, but he may move HOME."""
    ours = _contract(run, index, settings) + _credentials(run.spec.checkpoint)
    names = {variable["name"] for variable in ours}
    users = [_user(v) for v in run.spec.env if v.name not in names and not _reserved(v.name)]
    home = [] if any(v["name"] == "HOME" for v in users) else [{"name": "HOME", "value": HOME}]
    return home + users + ours


def command(spec: Spec) -> list[str]:
    """What every process runs: the script with its arguments, or the command as it is."""
    head = [f"{SCRIPT_DIR}/{spec.script.config_map.key}"] if spec.script is not None else list(spec.command)
    return [*head, *spec.args]


def _contract(run: TrainingRun, index: int, settings: PlanSettings) -> list[dict[str, Any]]:
    spec = run.spec
    plain = {
        Env.RUN_NAME: run.name,
        Env.RUN_NAMESPACE: run.namespace,
        Env.RUN_UID: run.uid,
        Env.NODE_INDEX: str(index),
        Env.PROCS_PER_NODE: str(spec.processes_per_node),
        Env.COORDINATOR_URL: settings.coordinator_url,
        Env.COORDINATOR_CA: settings.coordinator_ca,
        Env.TOKEN_FILE: TOKEN_FILE,
        Env.COMMAND: json.dumps(command(spec)),
        Env.PRELOAD: ",".join(spec.preload),
        Env.GRACE_SECONDS: str(spec.termination_grace_period_seconds),
        Env.RUNTIME_DIR: RUNTIME_DIR,
        **_checkpoint(spec.checkpoint),
    }
    fields = {
        Env.POD_NAME: "metadata.name",
        Env.POD_UID: "metadata.uid",
        Env.POD_IP: "status.podIP",
    }
    return [
        {"name": str(name), "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()
    ] + [{"name": str(name), "value": _literal(value)} for name, value in plain.items()]


def _checkpoint(spec: CheckpointSpec) -> dict[Env, str]:
    optional = {
        Env.CHECKPOINT_ENDPOINT: spec.endpoint,
        Env.CHECKPOINT_REGION: spec.region,
        Env.CHECKPOINT_EVERY_STEPS: spec.interval.steps,
        Env.CHECKPOINT_EVERY_SECONDS: spec.interval.seconds,
    }
    known = {name: str(value) for name, value in optional.items() if value is not None}
    return {Env.CHECKPOINT_URI: spec.uri, Env.CHECKPOINT_KEEP: str(spec.keep), **known}


def _credentials(spec: CheckpointSpec) -> list[dict[str, Any]]:
    """By reference only: the operator never reads a Secret. The kubelet says so when one is missing."""
    if spec.credentials_secret is None:
        return []
    name = spec.credentials_secret.name
    return [
        {
            "name": key,
            "valueFrom": {
                "secretKeyRef": {"name": name, "key": key} | ({"optional": True} if optional else {})
            },
        }
        for key, optional in CREDENTIALS
    ]


def _user(variable: EnvVar) -> dict[str, Any]:
    if variable.value_from is not None:
        return {"name": variable.name, "valueFrom": variable.value_from}
    return {"name": variable.name, "value": variable.value or ""}


def _reserved(name: str) -> bool:
    return name in RESERVED_ENV or name.startswith(RESERVED_ENV_PREFIXES)


def _literal(value: str) -> str:
    """The kubelet expands `$(NAME)` and makes `$` of `$$`; ours are literal (k8s third_party/.../expansion)."""
    return value.replace("$", "$$")
