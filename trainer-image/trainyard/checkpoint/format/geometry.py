"""Pieces of tensors: which box of the whole tensor is where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular piece of a tensor."""

    offset: Index
    shape: Index

    @classmethod
    def whole(cls, shape: Index) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count

    def overlap(self, other: Box) -> Box | None:
        """What both have; None if that is nothing. Of scalars, the scalar."""
        begin = tuple(map(max, self.offset, other.offset))
        end = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        if any(e <= b for b, e in zip(begin, end, strict=True)):
            return None
        return Box(begin, tuple(e - b for b, e in zip(begin, end, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """How to index this piece in a tensor that is the piece `outer`."""
        return tuple(
            slice(a - b, a - b + n) for a, b, n in zip(self.offset, outer.offset, self.shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """What this rank has of a tensor."""

    local: torch.Tensor
    box: Box
    whole: Index
    """Shape of the whole tensor."""
    first: bool
    """Of all ranks that have this very piece, this one is to write it."""


def piece(tensor: torch.Tensor) -> Piece:
    """A DTensor's local piece, any other tensor as a whole. A DTensor may have no elements here: then numel is 0.

    Raises CheckpointConfigError for one with pending sums (Partial), which has no content yet.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        shape = tuple(tensor.shape)
        return Piece(tensor, Box.whole(shape), shape, True)
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    from trainyard.checkpoint.errors import CheckpointConfigError

    if any(p.is_partial() for p in tensor.placements):
        raise CheckpointConfigError("a DTensor with Partial placements cannot be in a checkpoint")
    mesh = tensor.device_mesh
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    where = mesh.get_coordinate() or [0] * mesh.ndim
    first = all(
        at == 0
        for at, placement in zip(where, tensor.placements, strict=True)
        if isinstance(placement, Replicate)
    )
    return Piece(tensor.to_local(), Box(tuple(offset), tuple(shape)), tuple(tensor.shape), first)
