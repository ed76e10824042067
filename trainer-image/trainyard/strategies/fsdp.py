"""Every process holds a part of each parameter, gradient and optimizer state; layers are gathered while they compute."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.plugins.precision.mixed import MixedPrecision
from trainyard.strategies.base import Step
from trainyard.strategies.materialize import materialize
from trainyard.strategies.parallel import ParallelStrategy
from trainyard.strategies.wrapping import Policy, chosen, shardable

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from trainyard.core.module import LightningModule

SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2", "NO_SHARD")
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_MEANINGLESS = {
    "use_orig_params", "limit_all_gathers", "forward_prefetch", "backward_prefetch", "sync_module_states",
    "param_init_fn",
}  # fmt: skip
"""Arguments of the FullyShardedDataParallel that Lightning uses, whose subject `fully_shard` settles itself."""
_BASE = {
    "timeout", "process_group_backend", "start_method", "accelerator", "precision_plugin", "parallel_devices",
    "cluster_environment", "checkpoint_io",
}  # fmt: skip


class FSDPStrategy(ParallelStrategy):
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
    * `state_dict_type`: "full" or "sharded"; how `Trainer.save_checkpoint` writes. The elastic checkpoints do not ask.
    * `init_on_meta`: layers made in configure_model take no memory until they are sharded. They then get their values from
      their `reset_parameters`, so it is only right for models that initialise nothing otherwise.
    * `gather_on_teardown`: after a run, every rank's module is whole again, on the CPU.
    * `ignored_states` (`ignored_modules`, `ignored_params`): parameters that stay whole, and are not synchronised.

    Ranks start from rank 0's weights. What Lightning hands on to FullyShardedDataParallel, and `fully_shard` settles by
    itself, is taken and has no effect: use_orig_params, limit_all_gathers, forward_prefetch, backward_prefetch,
    sync_module_states, param_init_fn. Raises MisconfigurationException.
    """

    name = "fsdp"
    forward_is_collective = True
    allows_inference_mode = False
    """What is gathered in inference mode can never be trained with (torch: inference tensors)."""

    def __init__(
        self, *, auto_wrap_policy: Policy = None, sharding_strategy: Any = "FULL_SHARD",
        cpu_offload: Any = None, mixed_precision: Any = None, activation_checkpointing: Any = None,
        activation_checkpointing_policy: Policy = None, state_dict_type: str = "full",
        device_mesh: tuple[int, int] | DeviceMesh | None = None, init_on_meta: bool = False,
        gather_on_teardown: bool = True, ignored_states: Any = None, ignored_modules: Any = None,
        ignored_params: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**_check(kwargs))
        self.sharding_strategy = _sharding(sharding_strategy)
        if state_dict_type not in ("full", "sharded"):
            raise MisconfigurationException(
                f"state_dict_type: {state_dict_type!r} is neither 'full' nor 'sharded'"
            )
        if activation_checkpointing is not None and activation_checkpointing_policy is not None:
            raise MisconfigurationException(
                "activation_checkpointing: it is the old name of activation_checkpointing_policy; give one of them"
            )
        if (
            device_mesh is not None
            and "HYBRID" not in self.sharding_strategy
            and isinstance(device_mesh, tuple)
        ):
            raise MisconfigurationException(
                f"device_mesh: (replicas, shards) has a meaning with sharding_strategy='HYBRID_SHARD' only, not with "
                f"{self.sharding_strategy!r}"
            )
        self.state_dict_type = state_dict_type
        self.auto_wrap_policy = auto_wrap_policy
        self.activation_checkpointing_policy = activation_checkpointing_policy or activation_checkpointing
        self.cpu_offload = bool(getattr(cpu_offload, "offload_params", cpu_offload))
        self.mixed_precision = mixed_precision
        self.init_on_meta = init_on_meta
        self.gather_on_teardown = gather_on_teardown
        self._ignored = [*(ignored_states or ()), *(ignored_modules or ()), *(ignored_params or ())]
        self._given_mesh = device_mesh
        self._mesh: DeviceMesh | None = None
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

    @property
    def device_mesh(self) -> DeviceMesh:
        """After `connect`: ("dp_shard",), or ("dp_replicate", "dp_shard")."""
        if self._mesh is None:
            raise RuntimeError("device_mesh: there is none before the processes are connected")
        return self._mesh

    def connect(self) -> None:
        super().connect()
        if self._mesh is None:
            self._mesh = self._make_mesh()

    def disconnect(self) -> None:
        super().disconnect()
        self._mesh = None

    def _make_mesh(self) -> DeviceMesh:
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
        for name in _STEPS:
            self._register(module, name)

    def _shard(self, module: LightningModule) -> None:
        """Block by block, so that no more than one of them is ever whole on the device."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        from trainyard.strategies.placing import place

        policy, ignored = self._precision_policy(), self._ignored_parameters()
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

    def _precision_policy(self) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        given = self.mixed_precision
        if isinstance(given, MixedPrecisionPolicy):
            return given
        if given is not None:
            return MixedPrecisionPolicy(
                param_dtype=getattr(given, "param_dtype", None), reduce_dtype=getattr(given, "reduce_dtype", None),
                cast_forward_inputs=bool(getattr(given, "cast_forward_inputs", True)),
            )  # fmt: skip
        if isinstance(self.precision, MixedPrecision):
            # Autocast decides about inputs: a batch may hold targets that must keep their digits.
            return MixedPrecisionPolicy(
                param_dtype=self.precision.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        return MixedPrecisionPolicy()

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

    def _register(self, module: Any, name: str) -> None:
        """The step under another name, gathering the root's own parameters around itself.

        Not under its own: torch's wrapper hides how many arguments the step takes.
        """
        from torch.distributed.fsdp import register_fsdp_forward_method

        if callable(getattr(module, name, None)):
            setattr(module, _sharded(name), getattr(module, name))
            register_fsdp_forward_method(module, _sharded(name))

    def step(self, module: Any, name: str) -> Step:
        method: Step = getattr(module, _sharded(name))
        if name == "training_step":
            return method

        def run(*args: Any) -> Any:
            """No backward pass will free what was gathered, and whoever looks at the parameters wants to see shards."""
            try:
                return method(*args)
            finally:
                module.reshard()

        return run

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

        for name in _STEPS:
            module.__dict__.pop(_sharded(name), None)
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

    def clip_gradients(
        self, module: LightningModule, optimizer: Optimizer, value: float, algorithm: str
    ) -> None:
        from trainyard.strategies.sharded_state import clip_norm

        if algorithm == "value":
            super().clip_gradients(module, optimizer, value, algorithm)
            return
        self.precision.unscale(optimizer)
        clip_norm([p for group in optimizer.param_groups for p in group["params"]], value)

    # ---- state

    def model_state(self, module: LightningModule) -> dict[str, Any]:
        from trainyard.strategies.sharded_state import whole_model

        return whole_model(module, keep=self.is_global_zero)

    def load_model_state(
        self, module: LightningModule, state: dict[str, Any], *, strict: bool = True
    ) -> None:
        from trainyard.strategies.sharded_state import load_whole_model

        load_whole_model(module, state, strict=strict)

    def optimizer_state(self, module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
        from trainyard.strategies.sharded_state import whole_optimizer

        return whole_optimizer(optimizer, keep=self.is_global_zero)

    def load_optimizer_state(
        self, module: LightningModule, optimizer: Optimizer, state: dict[str, Any]
    ) -> None:
        from trainyard.strategies.sharded_state import load_whole_optimizer

        load_whole_optimizer(optimizer, state)


def _check(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Raises MisconfigurationException for what nobody knows."""
    for name in kwargs:
        if name not in _BASE | _MEANINGLESS:
            near = difflib.get_close_matches(name, sorted(_BASE | _MEANINGLESS), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise MisconfigurationException(f"{name}: FSDPStrategy does not take it{hint}")
    return {name: value for name, value in kwargs.items() if name in _BASE}


def _sharding(given: Any) -> str:
    """A name, or a member of torch.distributed.fsdp.ShardingStrategy."""
    name = str(getattr(given, "name", given)).upper()
    if name not in SHARDING:
        raise MisconfigurationException(f"sharding_strategy: {given!r} is none of {', '.join(SHARDING)}")
    return name


def _sharded(step: str) -> str:
    return f"_sharded_{step}"


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def _with_norms(module: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Batch normalisation stays in 32 bit, as its running statistics are: it becomes a block of its own."""
    norms = [part for part in module.modules() if _is_norm(part) and any(True for _ in part.parameters())]
    return [*norms, *(block for block in blocks if not _is_norm(block))]
