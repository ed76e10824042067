"""Default dtype, and batches in another dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from trainyard.data.batches import map_leaves


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """`torch.set_default_dtype` for a while: new layers, and `torch.zeros` and the like, have `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cast_floats(batch: Any, dtype: torch.dtype) -> Any:
    """`batch` with its floating point tensors in `dtype` (complex ones in complex128 for float64); other things as they are."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_floating_point():
            return leaf.to(dtype)
        wide = dtype == torch.float64 and leaf.is_complex()
        return leaf.to(torch.complex128) if wide else leaf

    return map_leaves(batch, cast)
