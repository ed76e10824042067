"""How ranks agree on small things, beside the gradients: over a gloo group of its own, so that nothing here waits
for the device, or gets into the order of the training group's collectives."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

CONTROL_TIMEOUT = timedelta(minutes=30)
"""Bounds what one rank may do while the others wait for it: fetch a checkpoint, prepare data, see a commit through
an outage. A peer that died is noticed at once (its connection breaks), a lost node by the operator."""


class Peers(Protocol):
    """Collectives: all ranks call the same one. Values are JSON."""

    rank: int
    world: int

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        ...

    def share(self, buffer: torch.Tensor, owner: int, *, whole: bool = True) -> bool:
        """Rank `owner`'s bytes, in every rank's `buffer` (1-D, uint8, of one size). False, and no bytes, if the owner says
        that they are not `whole`; what the others say does not count."""
        ...


class Alone:
    """A world of one."""

    rank = 0
    world = 1

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def any(self, flag: bool) -> bool:
        return flag

    def share(self, buffer: torch.Tensor, owner: int, *, whole: bool = True) -> bool:
        return whole


class GlooPeers:
    """Needs torch.distributed to be initialised."""

    def __init__(self, timeout: timedelta = CONTROL_TIMEOUT) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout)

    def broadcast(self, value: Any) -> Any:
        import torch
        import torch.distributed as dist

        data = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(size, src=0, group=self.group)
        buffer = _tensor(data) if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(buffer, src=0, group=self.group)
        return json.loads(buffer.numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        import torch
        import torch.distributed as dist

        data = _tensor(json.dumps(value).encode())
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([data.numel()], dtype=torch.int64), group=self.group)
        longest = max(int(s) for s in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.group)
        return [json.loads(p[: int(s)].numpy().tobytes()) for p, s in zip(parts, sizes, strict=True)]

    def any(self, flag: bool) -> bool:
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return bool(tensor)

    def share(self, buffer: torch.Tensor, owner: int, *, whole: bool = True) -> bool:
        import torch
        import torch.distributed as dist

        said = torch.tensor([int(whole)], dtype=torch.uint8)
        dist.broadcast(said, src=owner, group=self.group)
        if not bool(said):
            return False
        dist.broadcast(buffer, src=owner, group=self.group)
        return True


def _tensor(data: bytes) -> Any:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
