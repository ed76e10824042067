"""Numeric precision: what the forward pass computes in, and how the backward pass is scaled."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    import torch


class Precision:
    """32-bit: nothing to do."""

    name = "32-true"

    def forward_context(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around training_step and validation_step."""
        return contextlib.nullcontext()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


class BFloat16Mixed(Precision):
    """Weights in 32 bit, matrix products in bfloat16 (torch.autocast). No scaler: the exponent range is float32's."""

    name = "bf16-mixed"

    def forward_context(self, device: torch.device) -> AbstractContextManager[Any]:
        import torch

        return torch.autocast(device.type, dtype=torch.bfloat16)


_BY_NAME: dict[str, type[Precision]] = {
    "32": Precision, "32-true": Precision, "bf16": BFloat16Mixed, "bf16-mixed": BFloat16Mixed,
}  # fmt: skip


def make_precision(name: str | int | None) -> Precision:
    """Raises MisconfigurationException."""
    kind = _BY_NAME.get(str(name or "32-true"))
    if kind is None:
        raise MisconfigurationException(f"precision: {name!r} is none of {', '.join(_BY_NAME)}")
    return kind()
