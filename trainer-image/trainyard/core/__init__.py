"""What a user subclasses."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainyard.core.datamodule import LightningDataModule
    from trainyard.core.hooks import DataHooks, ModelHooks
    from trainyard.core.module import LightningModule

_WHERE = {
    "DataHooks": "hooks",
    "LightningDataModule": "datamodule",
    "LightningModule": "module",
    "ModelHooks": "hooks",
}

__all__ = ["DataHooks", "LightningDataModule", "LightningModule", "ModelHooks"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(f"{__name__}.{_WHERE[name]}"), name))
