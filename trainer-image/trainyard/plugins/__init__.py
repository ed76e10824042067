"""Parts that a Trainer is composed of and that a user may replace: `Trainer(plugins=[...])`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainyard.plugins.environments import ClusterEnvironment
    from trainyard.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
    from trainyard.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
    from trainyard.plugins.precision.deepspeed import DeepSpeedPrecision

_WHERE = {
    "ClusterEnvironment": "trainyard.plugins.environments",
    "DeepSpeedPrecision": "trainyard.plugins.precision.deepspeed",
    "DoublePrecision": "trainyard.plugins.precision",
    "HalfPrecision": "trainyard.plugins.precision",
    "LayerSync": "trainyard.plugins.layer_sync",
    "MixedPrecision": "trainyard.plugins.precision",
    "Precision": "trainyard.plugins.precision",
    "TorchSyncBatchNorm": "trainyard.plugins.layer_sync",
}

__all__ = [
    "ClusterEnvironment",
    "DeepSpeedPrecision",
    "DoublePrecision",
    "HalfPrecision",
    "LayerSync",
    "MixedPrecision",
    "Precision",
    "TorchSyncBatchNorm",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(_WHERE[name]), name))
