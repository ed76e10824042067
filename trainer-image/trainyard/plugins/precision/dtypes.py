"""Default dtype, and batches in another dtype."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch


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
    if isinstance(batch, torch.Tensor):
        if batch.is_floating_point():
            return batch.to(dtype)
        wide = dtype == torch.float64 and batch.is_complex()
        return batch.to(torch.complex128) if wide else batch
    if isinstance(batch, dict):
        cast = {key: cast_floats(value, dtype) for key, value in batch.items()}
        return cast if type(batch) is dict else type(batch)(cast)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(cast_floats(value, dtype) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(cast_floats(value, dtype) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch) if field.init]
        return dataclasses.replace(
            batch, **{name: cast_floats(getattr(batch, name), dtype) for name in fields}
        )
    return batch
