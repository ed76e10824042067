"""Trainyard's training library: PyTorch Lightning's API on plain torch, with checkpoints that survive anything.

    import trainyard as L

Names are imported when first used (PEP 562), so that `trainyard.checkpoint` and `trainyard.elastic` do not cost the
seconds that torch takes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainyard.callbacks.base import Callback
    from trainyard.checkpoint.config import CheckpointConfig
    from trainyard.core.datamodule import LightningDataModule
    from trainyard.core.datamodule import LightningDataModule as DataModule
    from trainyard.core.module import LightningModule
    from trainyard.core.module import LightningModule as Module
    from trainyard.reproducibility import seed_everything
    from trainyard.trainer.trainer import Trainer

_WHERE = {
    "Callback": ("trainyard.callbacks.base", "Callback"),
    "CheckpointConfig": ("trainyard.checkpoint.config", "CheckpointConfig"),
    "DataModule": ("trainyard.core.datamodule", "LightningDataModule"),
    "LightningDataModule": ("trainyard.core.datamodule", "LightningDataModule"),
    "LightningModule": ("trainyard.core.module", "LightningModule"),
    "Module": ("trainyard.core.module", "LightningModule"),
    "Trainer": ("trainyard.trainer.trainer", "Trainer"),
    "seed_everything": ("trainyard.reproducibility", "seed_everything"),
}

__all__ = [
    "Callback",
    "CheckpointConfig",
    "DataModule",
    "LightningDataModule",
    "LightningModule",
    "Module",
    "Trainer",
    "seed_everything",
]


_SUBMODULES = frozenset(
    ("accelerators", "callbacks", "cli", "core", "demos", "export", "loggers", "loops", "plugins", "profilers", "pytorch",
     "strategies", "trainer", "tuner", "utilities")
)  # fmt: skip
"""`import trainyard as L; L.callbacks.ModelCheckpoint` needs no import of its own."""


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    try:
        module, attribute = _WHERE[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return globals().setdefault(name, getattr(import_module(module), attribute))


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
