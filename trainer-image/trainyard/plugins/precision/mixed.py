"""Weights in 32 bit, matrix products in 16."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from trainyard.plugins.precision.base import Precision

if TYPE_CHECKING:
    import torch


class BFloat16Mixed(Precision):
    """torch.autocast to bfloat16. No scaler: the exponent range is float32's."""

    name = "bf16-mixed"
    has_context = True

    def forward_context(self, device: torch.device) -> AbstractContextManager[Any]:
        import torch

        return torch.autocast(device.type, dtype=torch.bfloat16)
