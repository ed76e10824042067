"""Who writes which piece: each element once, evenly, and without a message."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from tests.unit.ckpt_meshes import as_rank, sharded
from trainyard.checkpoint.errors import CheckpointConfigError
from trainyard.checkpoint.format.tree import flatten
from trainyard.checkpoint.plan import LEAST_CUT, Assigned, assign, rank_path, stretch

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64)


def written(plans: Sequence[Sequence[Assigned]]) -> dict[str, torch.Tensor]:
    """How often each element of each tensor is written, over all ranks."""
    counts: dict[str, torch.Tensor] = {}
    for plan in plans:
        assert len({a.name for a in plan}) == len(plan), "a file has one piece of a tensor"
        for a in plan:
            assert tuple(a.local.shape) == a.box.shape
            assert a.box.numel or 0 in a.whole, "an empty piece"
            count = counts.setdefault(a.name, torch.zeros(a.whole, dtype=torch.int64))
            assert count.shape == a.whole
            count[tuple(slice(o, o + n) for o, n in zip(a.box.offset, a.box.shape, strict=True))] += 1
    return counts


shapes = st.one_of(
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.tuples(st.integers(8_000, 70_000), st.integers(1, 5)),
)


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()), max_size=9),
    world=st.integers(1, 7),
    seed=st.integers(0, 100),
)
def test_plain_tensors_are_written_once_and_evenly(
    kinds: list[tuple[tuple[int, ...], torch.dtype, bool]], world: int, seed: int
) -> None:
    tensors = {
        f"checkpoint.{i}": torch.empty(shape, dtype=dtype) for i, (shape, dtype, _) in enumerate(kinds)
    }
    replicated = {f"checkpoint.{i}" for i, (_, _, shared) in enumerate(kinds) if shared}
    plans = [assign(tensors, rank=rank, world=world, replicated=replicated) for rank in range(world)]
    counts = written(plans)
    assert set(counts) == set(tensors)
    assert all((count == 1).all() for count in counts.values())

    # Rank 0's own come on top of its share.
    assert all(a.name in replicated for plan in plans[1:] for a in plan)
    shared = [tensors[name] for name in replicated]
    units = [
        t.nbytes // (t.shape[0] if t.dim() and t.nbytes >= LEAST_CUT else 1) for t in shared if t.numel()
    ]
    fair = sum(t.nbytes for t in shared) / world
    for plan in plans:
        assert sum(a.local.nbytes for a in plan if a.name in replicated) <= fair + max(units, default=0)
    cuts = sum(len([a for a in plan if a.name in replicated and a.box.numel]) for plan in plans)
    assert cuts <= len(units) + world - 1

    shuffled = list(tensors.items())
    random.Random(seed).shuffle(shuffled)
    again = assign(dict(shuffled), rank=world - 1, world=world, replicated=replicated)
    assert [(a.name, a.box) for a in again] == [(a.name, a.box) for a in plans[-1]]


@given(
    units=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 10**13)), max_size=8),
    count=st.integers(1, 40),
)
def test_stretches_meet_and_cover(units: list[tuple[int, int]], count: int) -> None:
    """Also at sizes where floats would be inexact."""
    ranges = [stretch(units, number, count) for number in range(count)]
    for thing, (n, _) in enumerate(units):
        borders = [r[thing] for r in ranges]
        assert borders[0][0] == 0
        assert borders[-1][1] == n
        assert all(a[1] == b[0] for a, b in pairwise(borders))
    total = sum(n * length for n, length in units)
    for mine in ranges:
        load = sum((end - begin) * length for (begin, end), (_, length) in zip(mine, units, strict=True))
        assert load * count <= total + max((length for _, length in units), default=0) * count


def test_a_ranks_own_tensors_are_its_own() -> None:
    """Though all ranks have them, under names that are alike but for the number."""
    plans = [
        assign(
            {f"{rank_path(rank)}.generator": torch.full((2,), rank), "rank-00001x": torch.ones(1)},
            rank=rank,
            world=3,
        )
        for rank in range(3)
    ]
    assert [[a.name for a in plan] for plan in plans] == [
        ["rank-00000.generator", "rank-00001x"],
        ["rank-00001.generator"],
        ["rank-00002.generator"],
    ]


def test_equal_layers_are_shared_evenly() -> None:
    """Nine layers on eight ranks: handing out whole ones would give one rank two."""
    tensors = {f"checkpoint.{i}": torch.empty(1024, 256) for i in range(9)}
    loads = [
        sum(a.local.nbytes for a in assign(tensors, rank=rank, world=8, replicated=tensors.keys()))
        for rank in range(8)
    ]
    assert set(loads) == {9 * 1024 * 1024 // 8}


# ---- DTensors


placement_pairs = st.tuples(
    st.sampled_from([Replicate(), Shard(0), Shard(1)]), st.sampled_from([Replicate(), Shard(0), Shard(1)])
)


@settings(max_examples=60, deadline=None)
@given(
    mesh_shape=st.sampled_from([(2,), (5,), (2, 2), (2, 3), (3, 2), (1, 4), (4, 1)]),
    kinds=st.lists(
        st.tuples(
            st.one_of(
                st.tuples(st.integers(0, 9), st.integers(0, 9)),
                st.tuples(st.integers(9_000, 9_100), st.integers(4, 5)),
            ),
            placement_pairs,
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_dtensors_are_written_once_and_evenly(
    mesh_shape: tuple[int, ...], kinds: list[tuple[tuple[int, int], tuple[Placement, Placement]]]
) -> None:
    """1-D meshes and HSDP's, lengths that no number of ranks divides, ranks with nothing."""
    world = torch.Size(mesh_shape).numel()
    wholes = {
        f"checkpoint.{i}": torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        for i, (shape, _) in enumerate(kinds)
    }
    placements = {f"checkpoint.{i}": p[: len(mesh_shape)] for i, (_, p) in enumerate(kinds)}
    plans = []
    for rank in range(world):
        with as_rank(rank, world):
            mesh = DeviceMesh("cpu", torch.arange(world).reshape(mesh_shape))
            tensors: dict[str, torch.Tensor] = {
                name: sharded(whole, mesh, placements[name]) for name, whole in wholes.items()
            }
            tensors["checkpoint.plain"] = torch.zeros(3)
            plans.append(assign(tensors, rank=rank, world=world, replicated={"checkpoint.plain"}))
    counts = written(plans)
    assert set(counts) == {*wholes, "checkpoint.plain"}
    assert all((count == 1).all() for count in counts.values())
    for a in (a for plan in plans for a in plan if a.name in wholes):
        want = wholes[a.name][tuple(slice(o, o + n) for o, n in zip(a.box.offset, a.box.shape, strict=True))]
        assert torch.equal(a.local, want)
    # All of one placement: then each rank's fair share is that of its piece.
    if len(set(placements.values())) == 1 and all(
        isinstance(p, Replicate) for p in placements["checkpoint.0"]
    ):
        total = sum(whole.nbytes for whole in wholes.values())
        for plan in plans:
            assert sum(a.local.nbytes for a in plan) <= (total + 12) / world + LEAST_CUT


def test_hsdp_replicas_share_the_work() -> None:
    """Two replicas of two shards: a quarter of the bytes each, not half for the first replica and none for the second."""
    loads = []
    for rank in range(4):
        with as_rank(rank, 4):
            mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2))
            tensors = {
                f"checkpoint.{i}": sharded(torch.ones(4096, 64), mesh, [Replicate(), Shard(0)])
                for i in range(3)
            }
            loads.append(sum(a.local.nbytes for a in assign(tensors, rank=rank, world=4)))
    assert loads == [3 * 4096 * 64 * 4 // 4] * 4


def test_a_part_of_the_ranks_may_have_a_tensor_to_themselves() -> None:
    """Stages of a pipeline: ranks 2 and 3 have what 0 and 1 know nothing of."""
    plans = []
    for rank in range(4):
        with as_rank(rank, 4):
            mesh = DeviceMesh("cpu", torch.tensor([[0, 1], [2, 3]])[rank // 2])
            name = f"checkpoint.stage{rank // 2}"
            tensors = {
                name: sharded(torch.ones(5, 2), mesh, [Shard(0)]),
                f"{name}.empty": sharded(torch.ones(0, 2), mesh, [Shard(0)]),
            }
            plans.append(assign(tensors, rank=rank, world=4))
    counts = written(plans)
    assert {name: int(count.sum()) for name, count in counts.items()} == {
        "checkpoint.stage0": 10, "checkpoint.stage0.empty": 0, "checkpoint.stage1": 10, "checkpoint.stage1.empty": 0,
    }  # fmt: skip
    assert [a.name for a in plans[2] if not a.box.numel] == ["checkpoint.stage1.empty"]


def test_a_rank_outside_of_the_mesh_has_nothing() -> None:
    with as_rank(2, 3):
        mesh = DeviceMesh("cpu", torch.tensor([0, 1]))
        tensor = DTensor.from_local(
            torch.empty(0), mesh, [Shard(0)], run_check=False, shape=torch.Size([4]), stride=(1,)
        )
        assert assign({"checkpoint.w": tensor}, rank=2, world=3) == []


def test_pending_sums_are_refused() -> None:
    with as_rank(0, 2):
        mesh = DeviceMesh("cpu", torch.arange(2))
        tensor = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
        with pytest.raises(CheckpointConfigError, match="Partial"):
            assign({"checkpoint.w": tensor}, rank=0, world=2)


def test_tied_dtensors_are_tied_on_every_rank() -> None:
    """Also where they have no elements: else a rank would ask for a name that no other wrote."""
    for rank in range(3):
        with as_rank(rank, 3):
            mesh = DeviceMesh("cpu", torch.arange(3))
            weight = sharded(torch.arange(2.0), mesh, [Shard(0)])
            other = sharded(torch.arange(2.0), mesh, [Shard(0)])
            found = flatten({"head": weight.detach(), "embedding": weight.detach(), "other": other})[1]
            assert list(found) == ["checkpoint.head", "checkpoint.other"]
