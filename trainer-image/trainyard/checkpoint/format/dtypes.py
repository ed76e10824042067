"""Names of dtypes in a safetensors header, to and from torch's."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# (safetensors' name, torch's): https://github.com/huggingface/safetensors, `tensor.rs`, enum Dtype.
NAMES = (
    ("F64", "float64"), ("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"),
    ("I64", "int64"), ("I32", "int32"), ("I16", "int16"), ("I8", "int8"), ("U8", "uint8"), ("BOOL", "bool"),
    ("U16", "uint16"), ("U32", "uint32"), ("U64", "uint64"), ("C64", "complex64"),
    ("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"), ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", "float8_e5m2fnuz"), ("F8_E8M0", "float8_e8m0fnu"),
)  # fmt: skip


@cache
def to_name(dtype: torch.dtype) -> str | None:
    """None if the format has none."""
    found = [theirs for theirs, ours in NAMES if f"torch.{ours}" == str(dtype)]
    return found[0] if found else None


@lru_cache(maxsize=64)
def from_name(name: str) -> torch.dtype | None:
    """None for what this torch, or this version, does not know."""
    import torch

    for theirs, ours in NAMES:
        if theirs == name:
            found: torch.dtype | None = getattr(torch, ours, None)
            return found
    return None
