"""DTensors as one rank of many has them, without the others: a fake process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """As `distribute_tensor`, but each rank cuts out its own: a fake group moves nothing."""
    local, where = whole, mesh.get_coordinate()
    assert where is not None
    for size, at, placement in zip(mesh.shape, where, placements, strict=True):
        if isinstance(placement, Shard):
            parts = list(local.chunk(size, placement.dim))
            local = parts[at] if at < len(parts) else local.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
