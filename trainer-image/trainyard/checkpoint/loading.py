"""From a commit to the state of this rank, laid out as the run is now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointError, ShardInvalid
from trainyard.checkpoint.format.geometry import Box, Index, piece
from trainyard.checkpoint.format.runs import Run
from trainyard.checkpoint.format.tree import Ref, refs, unflatten
from trainyard.checkpoint.reader import CheckpointReader, Request
from trainyard.peers import Peers
from trainyard_api.checkpoints import Shard

if TYPE_CHECKING:
    import torch

Layout = Callable[[dict[str, Any]], Callable[[str, Index], "torch.Tensor | None"]]
"""Given the checkpoint without its tensors: for the name and whole shape of a tensor the DTensor like which it is wanted,
None to have it whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a rank gets of a checkpoint."""

    main: dict[str, Any]
    """The checkpoint; sharded tensors are DTensors with this rank's piece."""
    own: dict[str, Any] | None
    """What the rank of this number knew; None if the checkpoint has no such rank."""
    first: dict[str, Any]
    """What rank 0 knew."""
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """On rank 0, if there are more or fewer ranks now: what each rank knew, with None for each tensor."""


def whole(_: dict[str, Any]) -> Callable[[str, Index], torch.Tensor | None]:
    """The layout of everything in one place."""
    return lambda name, shape: None


def load_state(
    reader: CheckpointReader, rank: int, layout: Layout = whole, peers: Peers | None = None
) -> State:
    """Everything that this rank needs, and of sharded tensors no more. Raises ShardInvalid, StoreError.

    With `peers` it is collective, for ranks that all want most of it: each part is read by one of them.
    """
    if peers is not None:
        reader.share_headers(peers)
    error: CheckpointError | None = None
    try:
        prepared = _prepare(reader, rank, layout)
    except CheckpointError as problem:
        error = problem
    if peers is not None and peers.any(error is not None):
        raise error or ShardInvalid(f"another rank cannot use the checkpoint of step {reader.record.step}")
    if error is not None:
        raise error
    trees, tensors, plan = prepared
    reader.fetch(plan, peers)
    state = {key: unflatten(tree, lambda ref: tensors[ref.name]) for key, tree in trees.items()}
    for key, value in state.items():
        if not isinstance(value, dict):
            raise ShardInvalid(f"step {reader.record.step}: {key!r} is no dict")
    ranks: list[dict[str, Any]] = []
    if rank == 0 and peers is not None and peers.world != reader.record.world_size:
        every = range(reader.record.world_size)
        ranks = [unflatten(reader.tree("rank", number), lambda ref: None) for number in every]
    return State(main=state["main"], own=state.get("own"), first=state["first"], ranks=ranks)


def _prepare(
    reader: CheckpointReader, rank: int, layout: Layout
) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[tuple[Shard, Run]]]:
    """(skeletons, memory for the tensors by name, what goes there)."""
    trees: dict[str, Any] = {"main": reader.tree("checkpoint"), "first": reader.tree("rank")}
    if rank == 0:
        trees["own"] = trees["first"]
    elif rank < reader.record.world_size:
        trees["own"] = reader.tree("rank", rank)
    like = layout(unflatten(trees["main"], lambda ref: None))
    wanted = {ref.name: ref for tree in trees.values() for ref in refs(tree)}
    there = sum(shard.size for shard in reader.record.shards)
    if sum(ref.nbytes for ref in wanted.values()) > there:
        raise ShardInvalid(f"the tensors of step {reader.record.step} are larger than its {there} bytes")
    tensors: dict[str, torch.Tensor] = {}
    requests: list[Request] = []
    for ref in wanted.values():
        tensors[ref.name], request = _target(ref, like(ref.name, ref.shape))
        requests += request
    return trees, tensors, reader.plan(requests, first=rank)


def _target(ref: Ref, like: torch.Tensor | None) -> tuple[torch.Tensor, list[Request]]:
    import torch
    from torch.distributed.tensor import DTensor

    if like is None:
        target = torch.empty(ref.shape, dtype=ref.dtype)
        return target, [Request(ref.name, Box.whole(ref.shape), ref.shape, target)] if target.numel() else []
    assert isinstance(like, DTensor)  # noqa: S101 - what Layout promises
    mine = piece(like)
    local = torch.empty(mine.box.shape, dtype=ref.dtype)
    sharded = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded, [Request(ref.name, mine.box, ref.shape, local)] if local.numel() else []
