"""LightningDataModule: data and its transforms, apart from the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.core.hooks import DataHooks

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer


class LightningDataModule(DataHooks):
    """The hooks of `lightning.pytorch.LightningDataModule` that belong to training and validation."""

    prepare_data_per_node: bool = True
    trainer: Trainer | None = None

    def state_dict(self) -> dict[str, Any]:
        """What to keep in checkpoints, under the class's name."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def on_exception(self, exception: BaseException) -> None:
        """When fit ends with an exception."""
