"""Batches on their way to the device, through the three transfer hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.core.hooks import DataHooks
from trainyard.data.connect import data_hook
from trainyard.plugins.precision.base import Precision

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Transfer:
    """`transfer(batch, number of the loader)`; what has nothing to do costs nothing."""

    def __init__(self, trainer: Trainer) -> None:
        self._before, self._move, self._after = (data_hook(trainer, name) for name in _HOOKS)
        self._device = trainer.strategy.device
        precision = trainer.strategy.precision
        converts = type(precision).convert_input is not Precision.convert_input
        self._convert = precision.convert_input if converts else None
        plain = all(
            getattr(hook, "__func__", None) is getattr(DataHooks, name)
            for hook, name in zip((self._before, self._move, self._after), _HOOKS, strict=True)
        )
        self._idle = plain and not converts and self._device.type == "cpu"

    def __call__(self, batch: Any, loader: int) -> Any:
        if self._idle:
            return batch
        batch = self._move(self._before(batch, loader), self._device, loader)
        if self._convert is not None:
            batch = self._convert(batch)
        return self._after(batch, loader)
