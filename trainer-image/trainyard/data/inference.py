"""A data module's preprocessing where there is no trainer: in a server, a notebook, a batch job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from trainyard.core.hooks import DataHooks


def prepare_batch(
    hooks: DataHooks, batch: Any, device: str | torch.device = "cpu", dataloader_idx: int = 0
) -> Any:
    """What a trainer makes of `batch` before it gives it to a step: the three transfer hooks, in order."""
    import torch

    batch = hooks.on_before_batch_transfer(batch, dataloader_idx)
    batch = hooks.transfer_batch_to_device(batch, torch.device(device), dataloader_idx)
    return hooks.on_after_batch_transfer(batch, dataloader_idx)


def predict_batches(hooks: DataHooks, device: str | torch.device = "cpu") -> Iterator[Any]:
    """The batches of `predict_dataloader`, one loader after the other, as predict_step would get them.

    `prepare_data` and `setup("predict")` are called before the first, `teardown("predict")` after the last.
    """
    hooks.prepare_data()
    hooks.setup("predict")
    try:
        given = hooks.predict_dataloader()
        for index, loader in enumerate(given if isinstance(given, list | tuple) else [given]):
            for batch in loader:
                yield prepare_batch(hooks, batch, device, index)
    finally:
        hooks.teardown("predict")
