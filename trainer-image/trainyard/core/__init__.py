"""What a user subclasses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
