"""The module shards itself, over a mesh of data-parallel and tensor-parallel processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.strategies.fsdp_arguments import state_dict_type
from trainyard.strategies.materialize import materialize
from trainyard.strategies.sharded import ShardedStrategy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from trainyard.core.module import LightningModule


class ModelParallelStrategy(ShardedStrategy):
    """`configure_model` finds the mesh in `self.device_mesh`, with the dimensions "data_parallel" and "tensor_parallel", and
    applies torch.distributed.tensor.parallel.parallelize_module and torch.distributed.fsdp.fully_shard to its layers.

    "auto" is one data-parallel group a node, and the node's processes for tensor parallelism (Lightning's rule). Processes
    of one tensor-parallel group get the same batches. Checkpoint files are whole; `save_distributed_checkpoint=True` is
    taken, and says so. Raises MisconfigurationException if nothing in the module is distributed, or the sizes do not make
    up the world.
    """

    name = "model_parallel"

    def __init__(
        self, data_parallel_size: int | str = "auto", tensor_parallel_size: int | str = "auto",
        save_distributed_checkpoint: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        for name, size in (
            ("data_parallel_size", data_parallel_size), ("tensor_parallel_size", tensor_parallel_size),
        ):  # fmt: skip
            if size != "auto" and not (isinstance(size, int) and size >= 1):
                raise MisconfigurationException(f"{name}: {size!r} is neither a positive number nor 'auto'")
        self._sizes = data_parallel_size, tensor_parallel_size
        self.state_dict_type = state_dict_type("sharded" if save_distributed_checkpoint else "full")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        mesh = self.device_mesh["data_parallel"]
        return {"num_replicas": mesh.size(), "rank": mesh.get_local_rank()}

    def make_mesh(self) -> DeviceMesh:
        from torch.distributed.device_mesh import init_device_mesh

        names = ("data_parallel", "tensor_parallel")
        return init_device_mesh(self.device.type, self._shape(), mesh_dim_names=names)

    def _shape(self) -> tuple[int, int]:
        data, tensor = self._sizes
        world = self.world_size
        data = self.num_nodes if data == "auto" else int(data)
        tensor = self.num_processes if tensor == "auto" else int(tensor)
        if data * tensor != world:
            raise MisconfigurationException(
                f"data_parallel_size: {data} x tensor_parallel_size {tensor} is not the number of processes, {world}"
            )
        return data, tensor

    @contextlib.contextmanager
    def init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """`empty_init`: on the meta device; layers get their values from `reset_parameters` once they are sharded."""
        with self.precision.init_context(), torch.device("meta") if empty_init else contextlib.nullcontext():
            yield

    def setup(self, module: LightningModule, *, training: bool) -> None:
        from torch.distributed.tensor import DTensor

        self._module = module
        self.precision.connect(self.device)
        if not any(isinstance(p, DTensor) for p in module.parameters()):
            raise MisconfigurationException(
                "strategy: ModelParallelStrategy, but no parameter is distributed; apply parallelize_module or fully_shard "
                "in configure_model, with self.device_mesh"
            )
        self.precision.convert_module(module)
        materialize(module, self.device)
        module.to(self.device)
        self.register_steps(module)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        assert self._module is not None  # noqa: S101 - there is no step before setup
        parts = [part for part in self._module.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_gradient_sync(True, recurse=False)

    def teardown(self, module: LightningModule) -> None:
        """The module stays as `configure_model` made it."""
        self.forget_steps(module)
