"""Batches of any shape: dicts, lists, tuples, dataclasses of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


def to_device(batch: Any, device: Any) -> Any:
    """A copy of `batch` with its tensors on `device`; what has a `to` of its own is asked to move itself."""
    import torch

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf if leaf.device == device else leaf.to(device, non_blocking=True)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return map_leaves(batch, move)


def map_leaves(batch: Any, function: Callable[[Any], Any]) -> Any:
    """A copy of `batch` with `function(leaf)` for all that is no dict, list, tuple or dataclass."""
    if isinstance(batch, dict):
        made = {k: map_leaves(v, function) for k, v in batch.items()}
        return made if type(batch) is dict else type(batch)(made)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(v, function) for v in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_leaves(v, function) for v in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [f.name for f in dataclasses.fields(batch) if f.init]
        return dataclasses.replace(batch, **{n: map_leaves(getattr(batch, n), function) for n in names})
    return function(batch)


def size_of(batch: Any) -> int:
    """Length of the first tensor's first dimension (Lightning's rule); 1 if there is none."""
    for tensor in _tensors(batch):
        return tensor.size(0) if tensor.ndim else 1
    return 1


def _tensors(batch: Any) -> Iterator[Any]:
    import torch

    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _tensors(getattr(batch, field.name))


def apply_to_tensors(data: Any, function: Callable[[Any], Any]) -> Any:
    """`data` with `function(tensor)` for each of its tensors."""
    import torch

    if isinstance(data, torch.Tensor):
        return function(data)
    if isinstance(data, dict):
        return {k: apply_to_tensors(v, function) for k, v in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(apply_to_tensors(v, function) for v in data))
    if isinstance(data, list | tuple):
        return type(data)(apply_to_tensors(v, function) for v in data)
    return data
