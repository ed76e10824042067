"""Items of DCP's plans, one at a time: what is to be written, and where what was read belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)

from trainyard.checkpoint.errors import CheckpointConfigError
from trainyard.checkpoint.format.geometry import Box
from trainyard.checkpoint.plan import Assigned

_RESERVED = "__metadata__"
"""safetensors' own entry in a header."""


def pieces_of(plan: SavePlan, planner: SavePlanner) -> list[Assigned]:
    """The tensors that a plan wants written; empty pieces are left out. Raises CheckpointConfigError."""
    found: dict[str, Assigned] = {}
    for item in plan.items:
        if item.type == WriteItemType.BYTE_IO:
            continue
        piece = _piece(item, planner)
        if not piece.box.numel and 0 not in piece.whole:
            continue
        if piece.name in found:
            raise CheckpointConfigError(
                f"{piece.name}: this rank has several pieces of it (a ShardedTensor?); use a DTensor, which has one"
            )
        found[piece.name] = piece
    return list(found.values())


def _piece(item: WriteItem, planner: SavePlanner) -> Assigned:
    name, about = item.index.fqn, item.tensor_data
    tensor = planner.resolve_data(item)
    if name == _RESERVED or about is None or not isinstance(tensor, torch.Tensor):
        raise CheckpointConfigError(f"{name}: cannot be the name of a tensor")
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        what = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else str(tensor.layout)
        raise CheckpointConfigError(f"{name}: a {what} tensor cannot be in a checkpoint")
    box = Box(tuple(about.chunk.offsets), tuple(about.chunk.sizes))
    if tuple(tensor.shape) != box.shape or tensor.dtype != about.properties.dtype:
        raise CheckpointConfigError(
            f"{name}: planned as {about.properties.dtype} of shape {list(box.shape)}, and is {tensor.dtype} of shape "
            f"{list(tensor.shape)}: a planner that changes tensors has to say so in its plan"
        )
    return Assigned(name, tensor, box, tuple(about.size))


def values_of(planner: SavePlanner, names: Iterable[str]) -> dict[str, Any]:
    """The objects themselves, before the planner would pickle them. Raises CheckpointConfigError for a planner that has its
    own way."""
    names = list(names)
    if not names:
        return {}
    if (
        not isinstance(planner, DefaultSavePlanner)
        or type(planner).transform_object is not DefaultSavePlanner.transform_object
    ):
        raise CheckpointConfigError(
            f"{names[0]}: the planner {type(planner).__qualname__} makes bytes of it, which cannot be in a checkpoint; use "
            "DefaultSavePlanner (its values are saved as they are, never pickled), or save tensors only"
        )
    return {name: planner.lookup_object(MetadataIndex(name)) for name in names}


def give(planner: LoadPlanner, item: ReadItem, value: Any) -> None:
    """Put a value where DCP would put what it unpickles. Raises CheckpointConfigError for a planner that has its own way."""
    if (
        not isinstance(planner, DefaultLoadPlanner)
        or type(planner).load_bytes is not DefaultLoadPlanner.load_bytes
    ):
        raise CheckpointConfigError(
            f"{item.dest_index.fqn}: the planner {type(planner).__qualname__} wants bytes to unpickle, of which there are "
            "none; use DefaultLoadPlanner"
        )
    name = item.dest_index.fqn
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], value)
    else:
        planner.state_dict[name] = value


def box_of(item: ReadItem) -> Box:
    """Of the whole tensor: DCP counts from the beginning of the piece in the checkpoint."""
    offset = item.storage_index.offset or torch.Size([0] * len(item.lengths))
    begin = tuple(a + b for a, b in zip(offset, item.storage_offsets, strict=True))
    return Box(begin, tuple(item.lengths))


def finisher(
    planner: LoadPlanner, item: ReadItem, target: torch.Tensor, source: torch.Tensor
) -> Callable[[], None]:
    """To be called when `source` is filled."""

    def finish() -> None:
        if source is not target:
            target.copy_(source)
        planner.commit_tensor(item, target)

    return finish
