"""Every process holds a part of each parameter, gradient and optimizer state; layers are gathered while they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.strategies import fsdp_arguments as arguments
from trainyard.strategies.materialize import materialize
from trainyard.strategies.sharded import ShardedStrategy
from trainyard.strategies.wrapping import Policy, chosen, shardable

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from trainyard.core.module import LightningModule


class FSDPStrategy(ShardedStrategy):
    """torch.distributed.fsdp.fully_shard, with the arguments of Lightning's FSDPStrategy.

    * `auto_wrap_policy`: modules that are gathered and freed as one; see `wrapping.chosen`.
    * `sharding_strategy`: "FULL_SHARD"; "SHARD_GRAD_OP" keeps gathered parameters until the backward pass is over;
      "HYBRID_SHARD" and "_HYBRID_SHARD_ZERO2" do the same within each group of `device_mesh` (replicas, shards), by
      default a node, and replicate between the groups; "NO_SHARD" replicates only, as ddp does.
    * `mixed_precision`: a MixedPrecisionPolicy (or FSDP's MixedPrecision), if not what `precision` makes of it:
      parameters are gathered in 16 bit, gradients reduced in 32.
    * `cpu_offload`: parameters, gradients and optimizer states live on the CPU, and go to the device layer by layer.
    * `activation_checkpointing_policy`: modules (as in `auto_wrap_policy`) whose activations are computed again in the
      backward pass.
    * `state_dict_type`: "full"; "sharded" is taken, and says that files are whole all the same.
    * `init_on_meta`: layers made in configure_model take no memory until they are sharded. They then get their values from
      their `reset_parameters`, so it is only right for models that initialise nothing otherwise.
    * `gather_on_teardown`: after a run, every rank's module is whole again, on the CPU.
    * `ignored_states` (`ignored_modules`, `ignored_params`): parameters that stay whole, and are not synchronised.

    Ranks start from rank 0's weights. What Lightning hands on to FullyShardedDataParallel, and `fully_shard` settles by
    itself, is taken and has no effect: use_orig_params, limit_all_gathers, forward_prefetch, backward_prefetch,
    sync_module_states, param_init_fn. Raises MisconfigurationException.
    """

    name = "fsdp"

    def __init__(
        self, *, auto_wrap_policy: Policy = None, sharding_strategy: Any = "FULL_SHARD",
        cpu_offload: Any = None, mixed_precision: Any = None, activation_checkpointing: Any = None,
        activation_checkpointing_policy: Policy = None, state_dict_type: str = "full",
        device_mesh: tuple[int, int] | DeviceMesh | None = None, init_on_meta: bool = False,
        gather_on_teardown: bool = True, ignored_states: Any = None, ignored_modules: Any = None,
        ignored_params: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**arguments.of_parallel(kwargs))
        self.sharding_strategy = arguments.sharding(sharding_strategy, device_mesh)
        self.state_dict_type = arguments.state_dict_type(state_dict_type)
        if activation_checkpointing is not None and activation_checkpointing_policy is not None:
            raise MisconfigurationException(
                "activation_checkpointing: it is the old name of activation_checkpointing_policy; give one of them"
            )
        self.auto_wrap_policy = auto_wrap_policy
        self.activation_checkpointing_policy = activation_checkpointing_policy or activation_checkpointing
        self.cpu_offload = bool(getattr(cpu_offload, "offload_params", cpu_offload))
        self.mixed_precision = mixed_precision
        self.init_on_meta = init_on_meta
        self.gather_on_teardown = gather_on_teardown
        self._ignored = [*(ignored_states or ()), *(ignored_modules or ()), *(ignored_params or ())]
        self._given_mesh = device_mesh
        self._checkpointed: list[nn.Module] = []

    # ---- where

    @property
    def default_backend(self) -> str:
        """With cpu_offload, norms of gradients are reduced between CPUs."""
        backend = super().default_backend
        return f"cpu:gloo,{self.device.type}:{backend}" if self._offloads else backend

    @property
    def _offloads(self) -> bool:
        return self.cpu_offload and self.device.type != "cpu"

    def make_mesh(self) -> DeviceMesh:
        """("dp_shard",), or ("dp_replicate", "dp_shard")."""
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        given, world = self._given_mesh, self.world_size
        if isinstance(given, DeviceMesh):
            return given
        kind = self.device.type
        if "HYBRID" in self.sharding_strategy:
            sizes = given or (self.num_nodes, world // self.num_nodes)
        elif self.sharding_strategy == "NO_SHARD":
            sizes = (world, 1)
        else:
            return init_device_mesh(kind, (world,), mesh_dim_names=("dp_shard",))
        if len(sizes) != 2 or sizes[0] * sizes[1] != world:
            raise MisconfigurationException(
                f"device_mesh: {sizes!r} is not (replicas, shards) of {world} processes; their product must be {world}"
            )
        return init_device_mesh(kind, sizes, mesh_dim_names=("dp_replicate", "dp_shard"))

    # ---- model and optimizers

    @contextlib.contextmanager
    def init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """`empty_init` is `init_on_meta` for this once."""
        meta = self.init_on_meta if empty_init is None else empty_init
        with self.precision.init_context(), torch.device("meta") if meta else contextlib.nullcontext():
            yield

    def setup(self, module: LightningModule, *, training: bool) -> None:
        from torch.distributed.fsdp import FSDPModule

        self._module = module
        self.precision.connect(self.device)
        if not isinstance(module, FSDPModule):
            if training:
                self.apply_layer_sync(module)
            self.precision.convert_module(module)
            self._recompute(module)
            self._shard(module)
        self.register_steps(module)

    def _shard(self, module: LightningModule) -> None:
        """Block by block, so that no more than one of them is ever whole on the device."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        from trainyard.strategies.placing import place

        policy, ignored = (
            arguments.precision_policy(self.mixed_precision, self.precision),
            self._ignored_parameters(),
        )
        common: dict[str, Any] = {"mesh": self.device_mesh, "ignored_params": ignored or None}
        if self._offloads:
            from torch.distributed.fsdp import CPUOffloadPolicy

            common["offload_policy"] = CPUOffloadPolicy()
        keeps = self.sharding_strategy in ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2")
        blocks = shardable(module, self.auto_wrap_policy)
        if policy.param_dtype is not None:
            blocks = _with_norms(module, blocks)
        placed: set[nn.Module] = set()
        for block in [*blocks, module]:
            materialize(block, self.device)
            place(block, self.device, placed, sync=self.world_size > 1, ignored=ignored)
            own = MixedPrecisionPolicy() if _is_norm(block) else policy
            fully_shard(block, mp_policy=own, reshard_after_forward=False if keeps else None, **common)

    def _ignored_parameters(self) -> set[nn.Parameter]:
        found: set[nn.Parameter] = set()
        for given in self._ignored:
            found.update(given.parameters() if isinstance(given, torch.nn.Module) else [given])
        return found

    def _recompute(self, module: nn.Module) -> None:
        """Activation checkpointing without a wrapper, so that names of parameters stay as they are."""
        from torch.utils.checkpoint import checkpoint

        if self.activation_checkpointing_policy is None:
            return
        for part in chosen(module, self.activation_checkpointing_policy, "activation_checkpointing_policy"):
            forward: Callable[..., Any] = part.forward

            def recomputed(*args: Any, _forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
                return checkpoint(_forward, *args, use_reentrant=False, **kwargs)

            part.forward = recomputed
            self._checkpointed.append(part)

    def setup_optimizers(self, module: LightningModule, optimizers: list[Optimizer]) -> list[Optimizer]:
        """Raises MisconfigurationException for an optimizer that was made before the parameters were sharded."""
        known = {id(p) for p in module.parameters()}
        for number, optimizer in enumerate(optimizers):
            if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
                raise MisconfigurationException(
                    f"configure_optimizers: optimizer {number} ({type(optimizer).__name__}) has parameters that the module "
                    "has no more: sharding replaced them. Make it in configure_optimizers, from self.parameters()"
                )
        return optimizers

    def teardown(self, module: Any) -> None:
        from trainyard.strategies.unshard import unshard

        self.forget_steps(module)
        if not self.gather_on_teardown:
            return
        unshard(module)
        for part in self._checkpointed:
            part.__dict__.pop("forward", None)
        self._checkpointed.clear()
        super().teardown(module)

    # ---- a step

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients are summed up whole on each rank, and scattered with the last batch of the step."""
        module: Any = self._module
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def _with_norms(module: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Batch normalisation stays in 32 bit, as its running statistics are: it becomes a block of its own."""
    norms = [part for part in module.modules() if _is_norm(part) and any(True for _ in part.parameters())]
    return [*norms, *(block for block in blocks if not _is_norm(block))]
