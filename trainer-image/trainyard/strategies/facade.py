"""What modules, callbacks and scripts read from `trainer.strategy`: Lightning's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.accelerators import Accelerator, Devices, make_accelerator
from trainyard.environment import Place
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    import torch

    from trainyard.core.module import LightningModule
    from trainyard.peers import Peers

_OPS = {
    "mean": "mean",
    "avg": "mean",
    "sum": "sum",
    "min": "min",
    "max": "max",
    "product": "product",
    "prod": "product",
}


class StrategyFacade:
    """Where a strategy runs, and what it is asked about that."""

    peers: Peers
    virtual_ranks: int | None = None
    """With `deterministic="elastic"`: into how many parts a step is divided, however many processes there are."""
    _module: LightningModule | None

    def __init__(self) -> None:
        self._place = Place()
        self._device: torch.device | None = None
        self.accelerator: str | Accelerator = "auto"
        self.devices: Devices = "auto"
        """`Trainer(devices=...)`. With a launcher only indices matter: the number of processes is the launcher's."""

    @property
    def place(self) -> Place:
        """This process among the others. To be set before `connect`."""
        return self._place

    @place.setter
    def place(self, place: Place) -> None:
        self._place, self._device = place, None

    @property
    def kind(self) -> Accelerator:
        """The accelerator, found. Raises MisconfigurationException when it is not there."""
        if not isinstance(self.accelerator, Accelerator):
            self.accelerator = make_accelerator(self.accelerator)
        return self.accelerator

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The devices of this node's processes. Raises MisconfigurationException."""
        counts = not isinstance(self.devices, list | tuple) and "," not in str(self.devices)
        launched = self.place.launched and counts
        found: list[torch.device] = self.kind.get_parallel_devices(
            self.kind.parse_devices("auto" if launched else self.devices)
        )
        return found * self.place.local_world_size if launched and self.kind.device_type == "cpu" else found

    @property
    def device(self) -> torch.device:
        """Of this process. Raises MisconfigurationException."""
        if self._device is None:
            devices = self.parallel_devices
            self._device = devices[self.place.local_rank % len(devices)]
        return self._device

    @property
    def root_device(self) -> torch.device:
        """Lightning's name for `device`."""
        return self.device

    @property
    def lightning_module(self) -> LightningModule | None:
        """None before `setup`."""
        return self._module

    @property
    def model(self) -> torch.nn.Module | None:
        """What runs: the module, or what it is wrapped in."""
        return self._module

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def global_rank(self) -> int:
        return self.place.rank

    @property
    def local_rank(self) -> int:
        return self.place.local_rank

    @property
    def node_rank(self) -> int:
        return self.place.node_rank

    @property
    def num_nodes(self) -> int:
        return self.place.nodes

    @property
    def num_processes(self) -> int:
        """Of this node."""
        return self.place.local_world_size

    @property
    def is_global_zero(self) -> bool:
        return self.place.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.place.world_size > 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Into how many shares the data is split, and which one this process gets."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over all ranks of `group`; what is no tensor is given back as it is.

        `reduce_op`: "mean" ("avg"), "sum", "min", "max", "product", or a torch.distributed.ReduceOp. Raises
        MisconfigurationException for another.
        """
        import torch

        if not isinstance(tensor, torch.Tensor):
            return tensor
        op = _OPS.get(str(reduce_op).rpartition(".")[2].lower())
        if op is None:
            raise MisconfigurationException(
                f"reduce_op: {reduce_op!r} is none of {', '.join(_OPS)}, or a ReduceOp of these"
            )
        return self.reduce_values(tensor, op, group)

    def reduce_values(self, values: torch.Tensor, op: str, group: Any = None) -> torch.Tensor:
        """Over all ranks: "mean", "sum", "min", "max" or "product". A new tensor."""
        raise NotImplementedError

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks (or any of them) say yes."""
        return not self.peers.any(not decision) if all else self.peers.any(decision)
