"""Metric objects by their methods: torchmetrics is no dependency (its documented interface is all that is used)."""

from __future__ import annotations

from typing import Any

import torch


def is_metric(value: Any) -> bool:
    """update, compute, reset: https://lightning.ai/docs/torchmetrics/stable/pages/implement.html"""
    return not isinstance(value, torch.Tensor) and all(
        callable(getattr(value, name, None)) for name in ("update", "compute", "reset")
    )


def path_of(module: torch.nn.Module, metric: Any, wanted: str | None) -> str | None:
    """Name of the attribute (or submodule) that `metric` is; None if it is none."""
    if wanted is not None and getattr(module, wanted, None) is metric:
        return wanted
    for name, found in module.named_modules():
        if found is metric:
            return name
    return next((name for name, found in vars(module).items() if found is metric), None)


def metric_states(module: torch.nn.Module) -> dict[str, Any]:
    """What metrics have gathered so far, by path: torchmetrics keeps it out of state_dict unless told otherwise."""
    states: dict[str, Any] = {}
    for path, metric in module.named_modules():
        defaults = getattr(metric, "_defaults", None)
        if is_metric(metric) and isinstance(defaults, dict) and defaults:
            states[path] = {
                "values": {name: _copy(getattr(metric, name)) for name in defaults},
                "updates": int(getattr(metric, "_update_count", 0)),
            }
    return states


def load_metric_states(module: torch.nn.Module, states: dict[str, Any], device: torch.device) -> None:
    """The inverse, for metrics that still exist."""
    metrics = dict(module.named_modules())
    for path, state in states.items():
        metric: Any = metrics.get(path)
        if metric is None:
            continue
        for name, value in state["values"].items():
            moved = [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
            setattr(metric, name, moved)
        metric._update_count = state["updates"]
        metric._computed = None


def _copy(value: Any) -> Any:
    return [v.detach().clone() for v in value] if isinstance(value, list) else value.detach().clone()
