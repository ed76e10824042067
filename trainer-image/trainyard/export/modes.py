"""The state that a module is exported in, and its own state afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from trainyard.export.errors import ExportError


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode and no gradients; afterwards each has the mode that it had.

    Raises ExportError for a module whose parameters are split over processes.
    """
    refuse_shards(module)
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, training in modes:
            each.training = training


def refuse_shards(module: torch.nn.Module) -> None:
    """Raises ExportError if this process holds only a part of a parameter."""
    split = [name for name, tensor in _tensors(module) if hasattr(tensor, "full_tensor")]
    if split:
        raise ExportError(
            f"{type(module).__name__}: {split[0]} and {len(split) - 1} others are split over processes: "
            "export after fit has returned, or load a checkpoint into a new module and export that"
        )


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
