"""One save: from the state in memory to a file in the staging folder. No message to another rank, no pickling, one copy."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING

from trainyard.checkpoint.format.tree import flatten
from trainyard.checkpoint.payload import Payload
from trainyard.checkpoint.plan import Assigned, assign, rank_path
from trainyard.checkpoint.staging import StagedFile, StagingFolder, layout_of, stage

if TYPE_CHECKING:
    import torch

    from trainyard.checkpoint.format.shardfile import Layout


class Planner:
    """Who writes what, where in the file: found once, and used again as long as nothing of what it depends on changes."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._pieces: list[Assigned] = []
        self._layout: Layout | None = None
        self.made = 0
        """Plans so far: the others were used again."""

    def plan(
        self, tensors: Mapping[str, torch.Tensor], *, rank: int, world: int, replicated: Collection[str]
    ) -> tuple[list[Assigned], Layout]:
        """Raises CheckpointConfigError."""
        key = (rank, world, frozenset(replicated), tuple((name, *_kind(t)) for name, t in tensors.items()))
        if self._layout is not None and key == self._key:
            return [_again(known, tensors[known.name]) for known in self._pieces], self._layout
        pieces = assign(tensors, rank=rank, world=world, replicated=replicated)
        self._layout = layout_of(pieces)
        self._key, self.made = key, self.made + 1
        # Without the tensors, which would be kept alive.
        self._pieces = [Assigned(p.name, p.local.new_empty(0), p.box, p.whole, p.rows) for p in pieces]
        return pieces, self._layout


def _kind(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """All of a tensor that `assign` and a header look at."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.dtype, tensor.shape, tensor.device_mesh, tensor.placements, tensor._local_tensor.shape
    return tensor.dtype, tensor.shape


def _again(known: Assigned, tensor: torch.Tensor) -> Assigned:
    """What `assign` found, of the tensor as it is now."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    if 0 in known.whole:
        local = local.new_empty(known.whole)
    elif known.rows is not None:
        local = local[known.rows[0] : known.rows[1]]
    return Assigned(known.name, local, known.box, known.whole, known.rows)


def save_shard(
    payload: Payload, folder: StagingFolder, planner: Planner | None = None, *, step: int, attempt: int, rank: int, world: int
) -> StagedFile:  # fmt: skip
    """Returns when the training may change the state again. `planner`: that of the saves before.

    Raises CheckpointConfigError for what cannot be saved, OSError for a full disk.
    """
    with _no_collections():
        skeleton, tensors = flatten(payload.checkpoint, "checkpoint")
        own_skeleton, own = flatten(payload.own, rank_path(rank))
        trees = {"rank": own_skeleton, **({"checkpoint": skeleton} if rank == 0 else {})}
        plan = (planner or Planner()).plan
        pieces, layout = plan({**tensors, **own}, rank=rank, world=world, replicated=payload.replicated)
        return stage(pieces, trees, folder, step=step, attempt=attempt, rank=rank, world=world, layout=layout)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Thousands of containers at once set off full collections of garbage, which take longer than all the rest; and there is
    no garbage among them."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
