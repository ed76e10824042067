"""Parts that a Trainer is composed of and that a user may replace: `Trainer(plugins=[...])`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.lazy import lazy_names

if TYPE_CHECKING:
    from trainyard.plugins.environments import ClusterEnvironment
    from trainyard.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
    from trainyard.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
    from trainyard.plugins.precision.deepspeed import DeepSpeedPrecision

_WHERE = {
    "ClusterEnvironment": "environments",
    "DeepSpeedPrecision": "precision.deepspeed",
    "DoublePrecision": "precision",
    "HalfPrecision": "precision",
    "LayerSync": "layer_sync",
    "MixedPrecision": "precision",
    "Precision": "precision",
    "TorchSyncBatchNorm": "layer_sync",
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

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
