"""Environments of the user's own making, as `Trainer(plugins=[...])` takes them. Those that are known need no plugin."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, MutableMapping
from typing import Any

from trainyard.environment import Place
from trainyard.errors import MisconfigurationException

__all__ = ["ClusterEnvironment", "LightningEnvironment", "SLURMEnvironment", "TorchElasticEnvironment"]


class ClusterEnvironment(ABC):
    """`lightning.pytorch.plugins.environments.ClusterEnvironment`: who this process is, in the user's own words."""

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """False: the Trainer starts them, and only asks where they are to meet."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """Host of rank 0."""

    @property
    @abstractmethod
    def main_port(self) -> int: ...

    @abstractmethod
    def world_size(self) -> int: ...

    @abstractmethod
    def global_rank(self) -> int: ...

    @abstractmethod
    def local_rank(self) -> int: ...

    @abstractmethod
    def node_rank(self) -> int: ...

    @staticmethod
    def detect() -> bool:
        return False

    def set_world_size(self, size: int) -> None:  # noqa: B027
        """Never called: it is the environment that says how many there are."""

    def set_global_rank(self, rank: int) -> None:  # noqa: B027
        """Never called."""


class _Known:
    """Is found by itself; as a plugin it says nothing new. Lightning's arguments are taken, and not needed."""

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs


class LightningEnvironment(_Known):
    """A script on a laptop."""


class TorchElasticEnvironment(_Known):
    """torchrun, or a TrainingRun."""


class SLURMEnvironment(_Known):
    """srun."""


def use_environment(plugins: Iterable[Any], nodes: int, env: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torchrun would set. Raises MisconfigurationException for two environments."""
    found = [plugin for plugin in plugins if isinstance(plugin, ClusterEnvironment)]
    if len(found) > 1:
        raise MisconfigurationException("plugins: there can be one ClusterEnvironment only")
    if not found or Place.from_env(env).launched:
        return
    environment = found[0]
    env.update(MASTER_ADDR=str(environment.main_address), MASTER_PORT=str(environment.main_port))
    if not environment.creates_processes_externally:
        env["NODE_RANK"] = str(environment.node_rank())
        return
    world = environment.world_size()
    env.update(
        WORLD_SIZE=str(world), RANK=str(environment.global_rank()), LOCAL_RANK=str(environment.local_rank()),
        LOCAL_WORLD_SIZE=str(max(1, world // nodes)), GROUP_RANK=str(environment.node_rank()),
    )  # fmt: skip
