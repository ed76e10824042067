"""Who this process is among the others, as whatever started it says.

`torchrun`, a TrainingRun, and our own launcher set the same variables; `srun` sets others. Nobody: a script on a laptop.
"""

from __future__ import annotations

import os
import re
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
    start: str | None = None
    """How the other processes are still to be started: "popen", "spawn" or "fork"; None if there is nothing to start."""

    @property
    def nodes(self) -> int:
        return max(1, self.world_size // self.local_world_size)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Place:
        """A world of one if no environment is detected. Raises ValueError that names variables with odd values."""
        environment = detect(env)
        return cls() if environment is None else environment.place(env)


class Environment:
    """What the processes of a run find in their environment, and what torch.distributed wants to find there."""

    name: str

    def detect(self, env: Mapping[str, str]) -> bool:
        """Whether it started this process."""
        raise NotImplementedError

    def place(self, env: Mapping[str, str]) -> Place:
        """Raises ValueError that names the variables."""
        raise NotImplementedError

    def rendezvous(self, env: Mapping[str, str]) -> dict[str, str]:
        """The variables that torch.distributed's `env://` reads, and this environment does not set."""
        return {}


class TorchElasticEnvironment(Environment):
    """torchrun (the variables that torch.distributed.run documents), and what does as it does."""

    name = "torchrun"

    def detect(self, env: Mapping[str, str]) -> bool:
        return "WORLD_SIZE" in env and "RANK" in env

    def place(self, env: Mapping[str, str]) -> Place:
        try:
            return Place(
                rank=int(env["RANK"]),
                local_rank=int(env.get("LOCAL_RANK", "0")),
                node_rank=int(env.get("GROUP_RANK", env.get("NODE_RANK", "0"))),
                world_size=int(env["WORLD_SIZE"]),
                local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
                launched="MASTER_ADDR" in env,
            )
        except ValueError as error:
            raise ValueError(f"RANK, WORLD_SIZE, LOCAL_RANK: {error}") from None


class SLURMEnvironment(Environment):
    """Tasks of `srun` (its manual: "OUTPUT ENVIRONMENT VARIABLES"). What `sbatch` or `salloc` runs is one process."""

    name = "srun"

    def detect(self, env: Mapping[str, str]) -> bool:
        # sbatch sets SLURM_PROCID too, for the script itself; only srun says where it listens.
        return "SLURM_SRUN_COMM_HOST" in env and "SLURM_PROCID" in env and "SLURM_NTASKS" in env

    def place(self, env: Mapping[str, str]) -> Place:
        try:
            world = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
            nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or "1")
            return Place(
                rank=int(env["SLURM_PROCID"]),
                local_rank=int(env.get("SLURM_LOCALID", "0")),
                node_rank=int(env.get("SLURM_NODEID", "0")),
                world_size=world,
                local_world_size=max(1, world // nodes),
                launched=True,
            )
        except ValueError as error:
            raise ValueError(f"SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_NODEID: {error}") from None

    def rendezvous(self, env: Mapping[str, str]) -> dict[str, str]:
        place = self.place(env)
        nodes = (
            env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
        )
        job = int("".join(filter(str.isdigit, env.get("SLURM_JOB_ID", ""))) or "0")
        wanted = {
            "MASTER_ADDR": first_host(nodes) or "127.0.0.1",
            "MASTER_PORT": str(20000 + job % 10000),  # two jobs on one node shall not meet
            "RANK": str(place.rank), "WORLD_SIZE": str(place.world_size), "LOCAL_RANK": str(place.local_rank),
            "LOCAL_WORLD_SIZE": str(place.local_world_size), "GROUP_RANK": str(place.node_rank),
        }  # fmt: skip
        return {name: value for name, value in wanted.items() if name not in env}


ENVIRONMENTS: tuple[Environment, ...] = (TorchElasticEnvironment(), SLURMEnvironment())
"""In the order in which they are tried."""


def detect(env: Mapping[str, str] = os.environ) -> Environment | None:
    """None: this script was started by hand."""
    return next((e for e in ENVIRONMENTS if e.detect(env)), None)


def first_host(nodes: str) -> str:
    """Of a SLURM node list such as `gpu[003-007,12],login1`: gpu003. Empty for an empty one."""
    first = re.match(r"([^,\[]*)(?:\[([^\]]*)\])?([^,\[]*)", nodes)
    if first is None:
        return ""
    prefix, numbers, suffix = first[1], first[2], first[3]
    return prefix + (re.split(r"[-,]", numbers)[0] if numbers else "") + suffix
