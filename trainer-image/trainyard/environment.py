"""Who this process is among the others, as torchrun says it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """One process of a run."""

    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launched: bool = False
    """By torchrun, or whatever else sets its variables; also for a world of one."""

    @property
    def nodes(self) -> int:
        return max(1, self.world_size // self.local_world_size)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Place:
        """The variables are those that torch.distributed.run documents. Raises ValueError for half of them."""
        if "WORLD_SIZE" not in env or "RANK" not in env:
            return cls()
        try:
            return cls(
                rank=int(env["RANK"]),
                local_rank=int(env.get("LOCAL_RANK", "0")),
                node_rank=int(env.get("GROUP_RANK", "0")),
                world_size=int(env["WORLD_SIZE"]),
                local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
                launched="MASTER_ADDR" in env,
            )
        except ValueError as error:
            raise ValueError(f"RANK, WORLD_SIZE, LOCAL_RANK: {error}") from None
