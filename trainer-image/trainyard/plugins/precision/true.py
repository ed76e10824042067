"""Everything in one precision that is not 32 bit: weights, inputs, gradients, optimizer states."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.plugins.precision.base import Precision
from trainyard.plugins.precision.dtypes import cast_floats, default_dtype


class _TruePrecision(Precision):
    has_context = True

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    def init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.dtype)

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        return module.to(dtype=self.dtype)

    def convert_input(self, batch: Any) -> Any:
        return cast_floats(batch, self.dtype)

    def forward_context(self, device: torch.device) -> AbstractContextManager[Any]:
        """New tensors made in a step have the module's dtype."""
        return default_dtype(self.dtype)


class DoublePrecision(_TruePrecision):
    """`precision="64-true"`: torch.float64."""

    def __init__(self) -> None:
        super().__init__("64-true", torch.float64)


class HalfPrecision(_TruePrecision):
    """`precision="bf16-true"` or `"16-true"`: torch.bfloat16 or torch.float16, with no copy of the weights in 32 bit.

    Raises MisconfigurationException for other names.
    """

    def __init__(self, precision: str = "16-true") -> None:
        dtypes = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
        if precision not in dtypes:
            raise MisconfigurationException(f"precision: {precision!r} is neither '16-true' nor 'bf16-true'")
        super().__init__(precision, dtypes[precision])
