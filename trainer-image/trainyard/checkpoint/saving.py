"""One save: from the state in memory to a file in the staging folder. No message to another rank, no pickling, one copy."""

from __future__ import annotations

from trainyard.checkpoint.format.tree import flatten
from trainyard.checkpoint.payload import Payload
from trainyard.checkpoint.plan import assign
from trainyard.checkpoint.staging import StagedFile, StagingFolder, stage


def save_shard(
    payload: Payload, folder: StagingFolder, *, step: int, attempt: int, rank: int, world: int
) -> StagedFile:
    """Returns when the training may change the state again. Raises CheckpointConfigError for what cannot be saved,
    OSError for a full disk."""
    skeleton, tensors = flatten(payload.checkpoint, "checkpoint")
    own_skeleton, own = flatten(payload.own, f"rank-{rank:05d}")
    trees = {"rank": own_skeleton, **({"checkpoint": skeleton} if rank == 0 else {})}
    pieces = assign({**tensors, **own}, rank=rank, world=world, replicated=payload.replicated)
    return stage(pieces, trees, folder, step=step, attempt=attempt, rank=rank, world=world)
