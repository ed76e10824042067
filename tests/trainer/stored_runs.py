"""Runs as they lie in a bucket or directory, written by hand: what readers and tools are tested with, damaged or not.

Nothing of the engine's way to save is used, only the format's own functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainyard.checkpoint.format.digest import Descriptor, digest, part_size, spans, tree_hash
from trainyard.checkpoint.format.geometry import Box
from trainyard.checkpoint.format.shardfile import Wanted, make_header
from trainyard.checkpoint.format.tree import flatten
from trainyard_api.checkpoints import Record, Shard, commit_key, descriptor_key, shard_key

Put = Callable[[str, bytes], Any]
"""Of a store, or of a test that keeps what it is given."""


def state(step: int = 1, *, rows: int = 8) -> dict[str, Any]:
    """A small Lightning-like checkpoint; all numbers follow from `step`."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(rows, 3, generator=generator)
    return {
        "state_dict": {"net.weight": weight, "net.bias": torch.full((3,), float(step)), "steps": torch.tensor(step)},
        "optimizer_states": [{"state": {0: {"exp_avg": weight * 2}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [], "epoch": step // 10, "global_step": step, "loops": {}, "nothing": None,
        "pytorch-lightning_version": "2.6.6",
        "shape": torch.Size([2, 3]), "pair": (1, "two"), "odd": float("inf"),
    }  # fmt: skip


def content(tensors: list[tuple[str, torch.Tensor, Box, tuple[int, ...]]], trees: Mapping[str, Any]) -> bytes:
    """The bytes of a shard: pieces are (name, piece, box, shape of the whole)."""
    pieces = {name: piece for name, piece, _, _ in tensors}
    wanted = [Wanted(name=name, dtype=p.dtype, box=box, whole=whole) for name, p, box, whole in tensors]
    header = make_header(wanted, dict(trees))
    data = header.raw
    for name in header.entries:
        data += pieces[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def shards_of(checkpoint: dict[str, Any], world: int) -> list[bytes]:
    """One file a rank: each tensor of two dimensions is cut into rows, all else is rank 0's."""
    skeleton, tensors = flatten(checkpoint)
    pieces: list[list[tuple[str, torch.Tensor, Box, tuple[int, ...]]]] = [[] for _ in range(world)]
    for name, tensor in tensors.items():
        whole = tuple(tensor.shape)
        if tensor.dim() != 2 or world == 1:
            pieces[0].append((name, tensor, Box.whole(whole), whole))
            continue
        begin = 0
        for rank, part in enumerate(tensor.tensor_split(world)):
            if part.numel():
                pieces[rank].append((name, part, Box((begin, 0), tuple(part.shape)), whole))
            begin += len(part)
    files = []
    for rank in range(world):
        own, more = flatten({"rng": torch.tensor([rank]), "number": rank}, f"rank-{rank:05d}")
        pieces[rank] += [(name, t, Box.whole(tuple(t.shape)), tuple(t.shape)) for name, t in more.items()]
        trees = {"rank": own} | ({"checkpoint": skeleton} if rank == 0 else {})
        files.append(content(pieces[rank], trees))
    return files


def describe(key: str, rank: int, data: bytes) -> Descriptor:
    part = part_size(len(data))
    parts = [digest(data[begin:end]) for begin, end in spans(len(data), part)]
    shard = Shard(key=key, rank=rank, size=len(data), sha256=tree_hash(parts), part_size=part)
    return Descriptor(shard=shard, parts=parts)


def put_shards(put: Put, files: list[bytes], *, step: int, attempt: int = 1) -> list[Shard]:
    shards = []
    for rank, data in enumerate(files):
        names: dict[str, Any] = {"step": step, "attempt": attempt, "rank": rank, "world": len(files)}
        described = describe(shard_key(**names), rank, data)
        put(described.shard.key, data)
        put(descriptor_key(**names), json.dumps(described.to_json()).encode())
        shards.append(described.shard)
    return shards


def put_commit(
    put: Put, run: str, checkpoint: dict[str, Any] | None = None, *, step: int, seq: int, attempt: int = 1,
    world: int = 1, files: list[bytes] | None = None, **more: Any,
) -> Record:  # fmt: skip
    """Shards, descriptors, and the record, of `checkpoint` (by default `state(step)`) or of ready-made `files`."""
    files = files or shards_of(state(step) if checkpoint is None else checkpoint, world)
    shards = put_shards(put, files, step=step, attempt=attempt)
    record = Record(
        kind="commit", seq=seq, run=run, attempt=attempt, step=step, time=1_700_000_000.0 + step,
        world_size=len(files), shards=shards, versions={"torch": "2"}, **{"reason": "steps", **more},
    )  # fmt: skip
    put(commit_key(seq), json.dumps(record.to_json()).encode())
    return record


def put_fence(put: Put, run: str, *, seq: int, attempt: int, step: int = 0, parent: int = 0) -> Record:
    record = Record(
        kind="fence", seq=seq, run=run, attempt=attempt, step=step, time=1_700_000_000.0, parent=parent
    )
    put(commit_key(seq), json.dumps(record.to_json()).encode())
    return record


def put_run(put: Put, run: str, *, steps: tuple[int, ...] = (10, 20, 30), world: int = 2) -> list[Record]:
    """A fence and a commit for each of `steps`."""
    records = [put_fence(put, run, seq=1, attempt=1)]
    for step in steps:
        metrics = {"val_loss": 1.0 / step}
        records.append(put_commit(put, run, step=step, seq=len(records) + 1, world=world, metrics=metrics))
    return records
