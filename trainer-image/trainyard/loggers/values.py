"""Metrics and hyperparameters in the shapes that vendors take."""

from __future__ import annotations

import dataclasses
import enum
from argparse import Namespace
from collections.abc import Mapping
from typing import Any


def add_prefix(metrics: Mapping[str, Any], prefix: str | None, separator: str) -> dict[str, Any]:
    """`{prefix}{separator}{name}`."""
    if not prefix:
        return dict(metrics)
    return {f"{prefix}{separator}{name}": value for name, value in metrics.items()}


def number(value: Any) -> float:
    """Of a number, or anything with one element (tensor, array). Raises ValueError."""
    if isinstance(value, (int, float)):
        return value
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{value!r} is no scalar") from error


def as_dict(params: Any) -> dict[str, Any]:
    """Of a mapping, Namespace, dataclass or None. Raises TypeError."""
    if params is None:
        return {}
    if isinstance(params, Namespace):
        return vars(params)
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        return {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    if isinstance(params, Mapping):
        return {str(k): v for k, v in params.items()}
    raise TypeError(f"hyperparameters: {type(params).__name__} is no mapping, Namespace or dataclass")


def _nested(value: Any) -> bool:
    return isinstance(value, (Mapping, Namespace)) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    )


def flatten(params: Any, separator: str = "/") -> dict[str, Any]:
    """{"a": {"b": 1}} becomes {"a/b": 1}. Sequences stay as they are; an empty mapping stays as {}."""
    flat: dict[str, Any] = {}
    for key, value in as_dict(params).items():
        inner = flatten(value, separator) if _nested(value) else None
        if inner:
            flat.update({f"{key}{separator}{k}": v for k, v in inner.items()})
        else:
            flat[key] = {} if inner is not None else value
    return flat


def plain(value: Any) -> bool | int | float | str:
    """What TensorBoard's, MLflow's and Comet's parameters can be: a number, or a text."""
    if isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def jsonable(value: Any) -> Any:
    """Mappings and sequences of what `plain` gives, and None."""
    if value is None:
        return None
    if _nested(value):
        return {k: jsonable(v) for k, v in as_dict(value).items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    return plain(value)
