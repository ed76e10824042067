"""TrainingRuns for tests: a small good one, and changes to it by path."""

from __future__ import annotations

import copy
from typing import Any

REMOVE = object()
"""As a value: the field is removed."""

_RUN: dict[str, Any] = {
    "apiVersion": "trainyard.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "digits"},
    "spec": {
        "image": "registry.example/trainer:1",
        "nodes": {"min": 2},
        "script": {"configMap": {"name": "digits"}},
        "checkpoint": {"uri": "s3://bucket/runs"},
    },
}


def training_run(changes: dict[str, Any] | None = None, *, name: str = "digits") -> dict[str, Any]:
    """A good run, with `changes`: {"spec.nodes.max": 3}. Intermediate objects are made; keys have no dots."""
    made = copy.deepcopy(_RUN)
    made["metadata"]["name"] = name
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        place = made
        for key in parents:
            place = place.setdefault(key, {})
        if value is REMOVE:
            del place[last]
        else:
            place[last] = value
    return made


def spec(**fields: Any) -> dict[str, Any]:
    """Changes to fields directly under spec."""
    return {f"spec.{key}": value for key, value in fields.items()}


def env(name: str, **more: Any) -> dict[str, Any]:
    return spec(env=[{"name": name, **more}])


def volume(**fields: Any) -> dict[str, Any]:
    """One volume; good but for `fields`. A field of None is left out."""
    good = {"name": "data", "mountPath": "/data", "emptyDir": {}}
    return spec(volumes=[{k: v for k, v in (good | fields).items() if v is not None}])


def checkpoint(**fields: Any) -> dict[str, Any]:
    return spec(checkpoint={"uri": "s3://bucket/runs", **fields})


def terms(**affinity_term: Any) -> dict[str, Any]:
    """A required pod anti-affinity of one term."""
    term = {"topologyKey": "kubernetes.io/hostname", **affinity_term}
    return spec(affinity={"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}})
