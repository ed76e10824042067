"""Environment of the trainer container: the contract's, the user's, and credentials by reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    return _with_users(run.spec, _contract(run, index, settings))


def cleanup_env(run: TrainingRun) -> list[dict[str, Any]]:
    """Of the pod that deletes the checkpoints: how to reach them. The user's variables too, which may hold
    credentials, a proxy or a CA bundle."""
    names = {Env.RUN_NAME: run.name, Env.RUN_NAMESPACE: run.namespace, Env.RUN_UID: run.uid}
    return _with_users(run.spec, _plain({**names, **_store(run.spec.checkpoint)}))


def _with_users(spec: Spec, contract: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours = contract + _credentials(spec.checkpoint)
    names = {variable["name"] for variable in ours}
    users = [_user(v) for v in spec.env if v.name not in names and not _reserved(v.name)]
    home = [] if any(v["name"] == "HOME" for v in users) else [{"name": "HOME", "value": HOME}]
    return home + users + ours


def _plain(values: Mapping[Env, str]) -> list[dict[str, Any]]:
    return [{"name": str(name), "value": _literal(value)} for name, value in values.items()]


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
        **_store(spec.checkpoint),
        **_saving(spec.checkpoint),
        **_determinism(spec),
    }
    fields = {
        Env.POD_NAME: "metadata.name",
        Env.POD_UID: "metadata.uid",
        Env.POD_IP: "status.podIP",
    }
    return [
        {"name": str(name), "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()
    ] + _plain(plain)


def _store(spec: CheckpointSpec) -> dict[Env, str]:
    """Where the checkpoints are."""
    known = {Env.CHECKPOINT_ENDPOINT: spec.endpoint, Env.CHECKPOINT_REGION: spec.region}
    return {Env.CHECKPOINT_URI: spec.uri} | {
        name: value for name, value in known.items() if value is not None
    }


def _saving(spec: CheckpointSpec) -> dict[Env, str]:
    """When they are written, which are kept, and where an attempt starts from."""
    best = spec.keep_best
    optional = {
        Env.CHECKPOINT_EVERY_STEPS: spec.interval.steps,
        Env.CHECKPOINT_EVERY_SECONDS: spec.interval.seconds,
        Env.CHECKPOINT_AUTO: 1 if spec.interval.auto else None,
        Env.CHECKPOINT_ON_EXCEPTION: 1 if spec.on_exception else None,
        Env.CHECKPOINT_KEEP_BEST: f"{best.metric}:{best.mode}:{best.count}" if best is not None else None,
    }
    always = {
        Env.CHECKPOINT_KEEP: spec.keep,
        Env.CHECKPOINT_RESUME: spec.resume,
        Env.CHECKPOINT_LOCAL: int(spec.local.enabled),
        Env.CHECKPOINT_COPIES: spec.local.copies,
    }
    return {name: str(value) for name, value in (always | optional).items() if value is not None}


def _determinism(spec: Spec) -> dict[Env, str]:
    if not spec.determinism:
        return {}
    return {Env.DETERMINISM: spec.determinism, Env.VIRTUAL_RANKS: str(spec.virtual_ranks or "")}


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
