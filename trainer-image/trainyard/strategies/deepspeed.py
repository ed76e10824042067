"""DeepSpeed's ZeRO: optimizer states, gradients and parameters are spread over the processes by its engine."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.plugins.precision.base import Precision
from trainyard.plugins.precision.deepspeed import DeepSpeedPrecision
from trainyard.strategies import deepspeed_config
from trainyard.strategies.base import Step
from trainyard.strategies.parallel import ParallelStrategy
from trainyard.utilities.optional import has

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainyard.accelerators import Accelerator
    from trainyard.core.module import LightningModule
    from trainyard.strategies.deepspeed_state import Groups

MISSING = (
    "strategy='deepspeed' needs the Python package deepspeed (tested with 0.19): pip install deepspeed. Its own optimizers "
    "compile C++ when they are first used (packages ninja and py-cpuinfo come with it, a compiler does not); torch's do not"
)


class DeepSpeedStrategy(ParallelStrategy):
    """A DeepSpeedEngine around the module, with the arguments of Lightning's DeepSpeedStrategy.

    * `stage`: 1 partitions the optimizer's states, 2 the gradients too, 3 the parameters too.
    * `offload_optimizer`, `offload_parameters`: to the CPU's memory or a disk (`offload_optimizer_device`,
      `offload_params_device`: "cpu", "nvme"; `nvme_path`, `*_buffer_*`, `max_in_cpu`, and what goes to "aio": `block_size`,
      `queue_depth`, `single_submit`, `overlap_events`, `thread_count`).
    * `config`: a dict, or a JSON file, of https://www.deepspeed.ai/docs/config-json; then it speaks alone, and the arguments
      for parts of it are not looked at. Batch sizes, accumulation, clipping, optimizer and scheduler are the Trainer's.
    * `loss_scale` (0: dynamic), `initial_scale_power`, `loss_scale_window`, `hysteresis`, `min_loss_scale`: of float16.
    * `partition_activations`, `cpu_checkpointing`, `contiguous_memory_optimization`, `synchronize_checkpoint_boundary`: of
      deepspeed.checkpointing.checkpoint, for modules that call it.
    * `exclude_frozen_parameters`: parameters that require no gradient are not in checkpoints.
    * `logging_batch_size_per_gpu`: for the engine's own reports of throughput; "auto" is 1.

    Checkpoints hold the whole state, weights in 32 bit: a run can go on with another number of processes, another stage,
    or another strategy. There is one optimizer. `remote_device` and `load_full_weights` are taken and have no effect: this
    is how weights are always loaded. Raises MisconfigurationException, and ModuleNotFoundError without deepspeed.
    """

    name = "deepspeed"
    plain_backward = False
    allows_inference_mode = False
    has_engine = True
    gathers_state = True

    def __init__(
        self, *, accelerator: Accelerator | None = None, zero_optimization: bool = True, stage: int = 2,
        remote_device: str | None = None, offload_optimizer: bool = False, offload_parameters: bool = False,
        offload_params_device: str = "cpu", nvme_path: str = "/local_nvme", params_buffer_count: int = 5,
        params_buffer_size: int = 100_000_000, max_in_cpu: int = 1_000_000_000, offload_optimizer_device: str = "cpu",
        optimizer_buffer_count: int = 4, block_size: int = 1_048_576, queue_depth: int = 8, single_submit: bool = False,
        overlap_events: bool = True, thread_count: int = 1, pin_memory: bool = False,
        sub_group_size: int = 1_000_000_000_000, contiguous_gradients: bool = True, overlap_comm: bool = True,
        allgather_partitions: bool = True, reduce_scatter: bool = True, allgather_bucket_size: int = 200_000_000,
        reduce_bucket_size: int = 200_000_000, zero_allow_untested_optimizer: bool = True,
        logging_batch_size_per_gpu: str | int = "auto", config: str | Path | Mapping[str, Any] | None = None,
        logging_level: int = logging.WARNING, parallel_devices: Any = None, cluster_environment: Any = None,
        loss_scale: float = 0, initial_scale_power: int = 16, loss_scale_window: int = 1000, hysteresis: int = 2,
        min_loss_scale: int = 1, partition_activations: bool = False, cpu_checkpointing: bool = False,
        contiguous_memory_optimization: bool = False, synchronize_checkpoint_boundary: bool = False,
        load_full_weights: bool = False, precision_plugin: Precision | None = None,
        process_group_backend: str | None = None, timeout: timedelta | None = None,
        exclude_frozen_parameters: bool = False, start_method: str = "popen",
    ) -> None:  # fmt: skip
        if not has("deepspeed"):
            raise ModuleNotFoundError(MISSING, name="deepspeed")
        super().__init__(
            timeout=timeout, process_group_backend=process_group_backend, start_method=start_method,
            accelerator=accelerator, precision_plugin=precision_plugin, parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
        )  # fmt: skip
        if not zero_optimization:
            raise MisconfigurationException("zero_optimization: False is what strategy='ddp' does; use that")
        if config is None:
            config = deepspeed_config.make(
                stage=stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters,
                offload_optimizer_device=offload_optimizer_device, offload_params_device=offload_params_device,
                nvme_path=nvme_path, pin_memory=pin_memory, params_buffer_count=params_buffer_count,
                params_buffer_size=params_buffer_size, max_in_cpu=max_in_cpu,
                optimizer_buffer_count=optimizer_buffer_count, sub_group_size=sub_group_size,
                contiguous_gradients=contiguous_gradients, overlap_comm=overlap_comm,
                allgather_partitions=allgather_partitions, reduce_scatter=reduce_scatter,
                allgather_bucket_size=allgather_bucket_size, reduce_bucket_size=reduce_bucket_size,
                aio={
                    "block_size": block_size, "queue_depth": queue_depth, "single_submit": single_submit,
                    "overlap_events": overlap_events, "thread_count": thread_count,
                },
                activation_checkpointing={
                    "partition_activations": partition_activations, "cpu_checkpointing": cpu_checkpointing,
                    "contiguous_memory_optimization": contiguous_memory_optimization,
                    "synchronize_checkpoint_boundary": synchronize_checkpoint_boundary,
                },
            )  # fmt: skip
        self.config = deepspeed_config.read(config)
        self.config.setdefault("zero_allow_untested_optimizer", zero_allow_untested_optimizer)
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        samples = 1 if logging_batch_size_per_gpu == "auto" else int(logging_batch_size_per_gpu)
        self.config.setdefault("train_micro_batch_size_per_gpu", samples)
        self.logging_level = logging_level
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self._loss_scaling = {
            "loss_scale": loss_scale, "initial_scale_power": initial_scale_power, "loss_scale_window": loss_scale_window,
            "hysteresis": hysteresis, "min_loss_scale": min_loss_scale,
        }  # fmt: skip
        self._engine: Any = None
        self._groups: Groups | None = None
        self._optimizer: Optimizer | None = None
        self._loaded: dict[str, Any] | None = None
        """Weights that the engine, which is still to be made, shall have."""
        self._manual = False

    @property
    def stage(self) -> int:
        return int(self.config["zero_optimization"]["stage"])

    @property
    def forward_is_collective(self) -> bool:  # type: ignore[override]
        """Parameters are gathered in it; and with stage 2 gradients are reduced in every backward pass."""
        return self.stage > 1

    @property
    def deepspeed_engine(self) -> Any:
        """The DeepSpeedEngine, within a run; else None."""
        return self._engine

    @property
    def model(self) -> torch.nn.Module | None:
        return self._engine or self._module

    # ---- where

    def connect(self) -> None:
        super().connect()
        # It looks for the accelerator once, when it is imported.
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().device_name() != self.device.type:
            raise MisconfigurationException(
                f"accelerator: DeepSpeed uses {get_accelerator().device_name()!r} in this process, and the Trainer "
                f"{self.device.type!r}; set the environment variable DS_ACCELERATOR={self.device.type}"
            )
        deepspeed.utils.logger.setLevel(self.logging_level)
        if not isinstance(self.precision, DeepSpeedPrecision):
            self.precision = DeepSpeedPrecision(self.precision.name)
        # Its own all-reduce between CPUs compiles C++ in every rank's start, and takes all ranks to be on one node.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=self.default_backend, verbose=False)

    def _full_config(self) -> dict[str, Any]:
        return deepspeed_config.with_precision(
            {**copy.deepcopy(self.config), "gradient_accumulation_steps": 1},
            self.precision.name,
            self._loss_scaling,
        )

    # ---- model and optimizers

    @contextlib.contextmanager
    def init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """With stage 3, layers that are made in configure_model are partitioned one by one: no rank ever has them all."""
        if self.stage != 3 or not self._connected_to_others:
            with super().init_context(empty_init):
                yield
            return
        from deepspeed.runtime.zero import Init

        with super().init_context(empty_init), Init(config_dict_or_path=self._full_config()):
            yield

    @property
    def _connected_to_others(self) -> bool:
        return torch.distributed.is_initialized()

    def setup(self, module: LightningModule, *, training: bool) -> None:
        config = self._full_config()
        self._module, self._groups, self._loaded, self._manual = module, None, None, False
        self.precision.connect(self.device)
        if training:
            self.apply_layer_sync(module)
            self._configure_checkpointing(config)
            return  # the engine is made with the optimizer
        if self.stage == 3:
            self._make_engine(module, None, config)
            return
        self.precision.convert_module(module)
        module.to(self.device)

    def setup_optimizers(self, module: LightningModule, optimizers: list[Optimizer]) -> list[Optimizer]:
        """Raises MisconfigurationException unless there is one."""
        from trainyard.strategies.deepspeed_state import Groups, load_masters

        if len(optimizers) != 1:
            raise MisconfigurationException(
                f"configure_optimizers: strategy='deepspeed' trains with one optimizer, there are {len(optimizers)}; use "
                "'ddp' or 'fsdp' for several"
            )
        (optimizer,) = optimizers
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "configure_optimizers: LBFGS evaluates the loss several times in a step, which strategy='deepspeed' cannot"
            )
        self._groups = Groups.of(optimizer)
        self._make_engine(module, optimizer, self._full_config())
        zero = self._engine.optimizer
        if zero.optimizer is not optimizer:  # Adagrad: it is made anew; schedulers have the old one
            for mine, its in zip(optimizer.param_groups, zero.optimizer.param_groups, strict=True):
                mine["params"] = its["params"]
            zero.optimizer.param_groups = optimizer.param_groups
        if self._loaded is not None:
            load_masters(module, self._loaded, self._groups.trained, self.global_rank)
            self._loaded = None
        if isinstance(self.precision, DeepSpeedPrecision):
            self.precision.loss_scaler = getattr(zero, "loss_scaler", None)
        # Not the engine's: callbacks and hooks look for a torch optimizer, and schedulers have this one. Its own zero_grad
        # would drop the buffers that gradients are offloaded into.
        optimizer.zero_grad = zero.zero_grad  # type: ignore[method-assign]
        self._optimizer = optimizer
        return [optimizer]

    def _make_engine(
        self, module: LightningModule, optimizer: Optimizer | None, config: dict[str, Any]
    ) -> None:
        import deepspeed

        self._engine, *_ = deepspeed.initialize(
            model=_Steps(module), optimizer=optimizer, config=config, dist_init_required=False
        )
        if optimizer is not None:
            self._engine.set_gradient_accumulation_boundary(True)

    def _configure_checkpointing(self, config: dict[str, Any]) -> None:
        given = config.get("activation_checkpointing") or {}
        if any(given.values()):
            import deepspeed

            deepspeed.checkpointing.configure(
                mpu_=None, partition_activations=given.get("partition_activations"),
                contiguous_checkpointing=given.get("contiguous_memory_optimization"),
                checkpoint_in_cpu=given.get("cpu_checkpointing"), profile=given.get("profile"),
            )  # fmt: skip

    def begin_manual(self, module: LightningModule) -> None:
        if self.stage == 3:
            raise MisconfigurationException(
                "strategy: with stage 3 DeepSpeed releases parameters when forward is over, and manual optimization runs "
                "backward before; use stage 1 or 2"
            )
        self._manual = True

    def trainable_changed(self, module: LightningModule) -> None:
        raise MisconfigurationException(
            "requires_grad: DeepSpeed has laid out the parameters that are trained; set it before the fit, or use 'ddp'"
        )

    def step(self, module: LightningModule, name: str) -> Step:
        engine = self._engine
        if engine is None or (self._manual and name == "training_step"):
            return super().step(module, name)
        if name == "training_step":
            return lambda *args: engine(name, *args)
        return lambda *args: engine.module(name, *args)

    def teardown(self, module: LightningModule) -> None:
        from trainyard.strategies.deepspeed_state import plain, whole_weight

        engine, self._engine = self._engine, None
        if engine is not None:
            trained = self._groups.trained if self._groups else set()
            true = self.precision.name.endswith("-true")
            weights = {}
            for parameter in module.parameters():
                full = whole_weight(parameter, trained)
                weights[id(parameter)] = full.to(parameter.dtype if true else full.dtype, copy=True)
            engine.destroy()
            plain(module, weights)
        if isinstance(self.precision, DeepSpeedPrecision):
            self.precision.loss_scaler = None
        if self._optimizer is not None:
            vars(self._optimizer).pop("zero_grad", None)
            self._optimizer = None
        super().teardown(module)

    # ---- a step

    def backward(self, module: LightningModule, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if self._manual:
            # The engine wants to see in its forward what backward is run on.
            loss = self._engine(None, loss)
        self._engine.backward(loss, retain_graph=kwargs.get("retain_graph", False))

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        engine = self._engine
        engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            engine.set_gradient_accumulation_boundary(True)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Without a loss, nothing happens."""
        engine = self._engine
        engine.optimizer.clip_grad = float(self.config.get("gradient_clipping", 0.0))
        answer = closure()
        if answer is not None or self._manual:
            engine.step()
            # The first step may have been left out for an inf: a scheduler would warn.
            optimizer._opt_called = True  # type: ignore[attr-defined]
        return answer

    def clip_gradients(
        self, module: LightningModule, optimizer: Optimizer, value: float, algorithm: str
    ) -> None:
        """Within the engine's step. Raises MisconfigurationException for "value"."""
        if algorithm == "value":
            raise MisconfigurationException(
                "gradient_clip_algorithm: DeepSpeed clips by norm only; use 'norm', or strategy 'fsdp'"
            )
        self._engine.optimizer.clip_grad = float(value)

    # ---- state

    def model_state(self, module: LightningModule) -> dict[str, Any]:
        from trainyard.strategies.deepspeed_state import whole_model

        state = whole_model(module, self._groups.trained if self._groups else set(), keep=self.is_global_zero)
        if self.exclude_frozen_parameters:
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if not parameter.requires_grad:
                    state.pop(name, None)
        return state

    def load_model_state(
        self, module: LightningModule, state: dict[str, Any], *, strict: bool = True
    ) -> None:
        from trainyard.strategies.deepspeed_state import load_masters, load_model

        load_model(module, state, strict=strict and not self.exclude_frozen_parameters)
        if self._groups is None:
            self._loaded = state
        else:
            load_masters(module, state, self._groups.trained, self.global_rank)

    def optimizer_state(self, module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
        """Raises MisconfigurationException for states on a disk."""
        from trainyard.strategies.deepspeed_state import whole_optimizer

        assert self._groups is not None  # noqa: S101 - there is no optimizer before setup_optimizers
        if deepspeed_config.offloads_to_nvme(self.config):
            raise MisconfigurationException(
                "offload_optimizer_device: what is on 'nvme' cannot be put into a checkpoint; use 'cpu', or "
                "enable_checkpointing=False"
            )
        return whole_optimizer(self._engine.optimizer, self._groups, keep=self.is_global_zero)

    def load_optimizer_state(
        self, module: LightningModule, optimizer: Optimizer, state: dict[str, Any]
    ) -> None:
        from trainyard.strategies.deepspeed_state import load_whole_optimizer

        assert self._groups is not None  # noqa: S101
        load_whole_optimizer(self._engine.optimizer, self._groups, state, self.global_rank)


class _Steps(torch.nn.Module):
    """The engine calls forward, and there are four steps; None gives back what it is given."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, name: str | None, *args: Any) -> Any:
        return args[0].clone() if name is None else getattr(self.module, name)(*args)
