"""Pieces of tensors: which box of the whole tensor is where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

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
    holders: Index | None
    """The ranks that have this very piece, in order. Of a DTensor's empty piece: all ranks of its mesh. None: not a
    DTensor, which does not tell."""


def piece(tensor: torch.Tensor) -> Piece:
    """A DTensor's local piece, any other tensor as a whole. A DTensor may have no elements here: then numel is 0.

    Raises CheckpointConfigError for one with pending sums (Partial), which has no content yet, and for one whose local
    rows do not lie together (uneven sharding of one dimension by two of the mesh).
    """
    from torch.distributed.tensor import DTensor

    from trainyard.checkpoint.errors import CheckpointConfigError

    whole = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(tensor, Box.whole(whole), whole, None)
    mesh = tensor.device_mesh
    where = mesh.get_coordinate()
    box, holders = _place(whole, mesh, tuple(tensor.placements), None if where is None else tuple(where))
    local = tensor.to_local()
    if box.numel and tuple(local.shape) != box.shape:
        raise CheckpointConfigError(
            f"a DTensor of shape {list(whole)} has a local piece of {list(local.shape)}, its placements say {list(box.shape)}"
        )
    return Piece(local, box, whole, holders)


@lru_cache(
    maxsize=4096
)  # a model has few kinds of tensors, and torch takes time in proportion to their length
def _place(
    whole: Index, mesh: DeviceMesh, placements: tuple[Placement, ...], where: Index | None
) -> tuple[Box, Index]:
    """(box, holders) of the rank at the coordinate `where`: an argument, since equal meshes may have unequal ones."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    from trainyard.checkpoint.errors import CheckpointConfigError

    if any(p.is_partial() for p in placements):
        raise CheckpointConfigError("a DTensor with Partial placements cannot be in a checkpoint")
    everyone = tuple(sorted(mesh.mesh.flatten().tolist()))
    if where is None:  # another part of the model
        return Box((0,) * len(whole), (0,) * len(whole)), everyone
    if all(type(p) in (Replicate, Shard) for p in placements):
        shape, offset = _compute_local_shape_and_global_offset(whole, mesh.shape, list(where), placements)
    else:
        shape, offset = _strided(whole, mesh.shape, where, placements)
    if 0 in shape:
        return Box((0,) * len(whole), tuple(shape)), everyone
    same = tuple(
        slice(None) if isinstance(p, Replicate) else at for at, p in zip(where, placements, strict=True)
    )
    holders = tuple(sorted(mesh.mesh[same].flatten().tolist()))
    return Box(tuple(offset), tuple(shape)), holders


def _strided(
    whole: Index, mesh_shape: Index, where: Index, placements: tuple[Placement, ...]
) -> tuple[Index, Index]:
    """Shape and offset where FSDP has sharded what tensor parallelism had sharded before (_StridedShard): such a piece
    may be rows that do not lie together, of which torch's own function tells the first."""
    import torch
    from torch.distributed.tensor import Replicate

    from trainyard.checkpoint.errors import CheckpointConfigError

    rows = [torch.arange(length) for length in whole]
    for size, at, placement in zip(mesh_shape, where, placements, strict=True):
        if isinstance(placement, Replicate):
            continue
        if not hasattr(placement, "_split_tensor"):
            raise CheckpointConfigError(f"a DTensor with the placement {placement} cannot be in a checkpoint")
        dim = placement.dim  # type: ignore[attr-defined]
        rows[dim] = placement._split_tensor(rows[dim], size, with_padding=False)[0][at]
    for index in rows:
        if len(index) and int(index[-1]) - int(index[0]) + 1 != len(index):
            raise CheckpointConfigError(
                f"a DTensor of shape {list(whole)}, sharded as {list(placements)}, has rows on this rank that do not lie "
                "together; give the dimension a length that all mesh dimensions that shard it divide"
            )
    return tuple(map(len, rows)), tuple(int(index[0]) if len(index) else 0 for index in rows)
