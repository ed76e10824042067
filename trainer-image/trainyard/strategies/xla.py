"""PyTorch/XLA: operations are recorded, and compiled and run when a step is over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.strategies.base import Step, Strategy
from trainyard.strategies.parallel import ParallelStrategy

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainyard.accelerators import Accelerator
    from trainyard.core.module import LightningModule

DEBUG_ENV = "PT_XLA_DEBUG"


class _XLA(Strategy):
    """What both strategies have in common.

    A step's graph ends with `torch_xla.sync()`: after the optimizer has stepped, after a batch that it does not step after,
    and after each batch of evaluation. Checkpoints hold tensors of the CPU.
    """

    allows_inference_mode = False
    """Tensors that were recorded in inference mode cannot be synchronised outside of it."""
    plain_backward = False
    gathers_state = True

    def __init__(self, *args: Any, debug: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.debug = debug

    @property
    def device(self) -> torch.device:
        """torch_xla's device of this process."""
        if self._device is None:
            _ = self.kind  # raises if there is none
            import torch_xla

            self._device = torch_xla.device()
        return self._device

    def connect(self) -> None:
        import os

        if self.kind.device_type != "xla":
            raise MisconfigurationException(
                f"strategy: {self.name!r} is for accelerator='tpu', not {self.kind.name()!r}"
            )
        if self.precision.name == "16-mixed":
            raise MisconfigurationException(
                "precision: '16-mixed' scales the loss step by step; on XLA use 'bf16-mixed'"
            )
        if self.debug:
            os.environ[DEBUG_ENV] = "1"
        self._join_devices()
        super().connect()
        self._seed()

    def _join_devices(self) -> None:
        """Before this process's device is made."""

    def _seed(self) -> None:
        """Its generator does not follow torch.manual_seed."""
        import torch_xla.core.xla_model as xm

        xm.set_rng_state((torch.initial_seed() + self.global_rank) % 2**31, str(self.device))

    # ---- a step

    def step(self, module: LightningModule, name: str) -> Step:
        method = super().step(module, name)
        if name == "training_step":
            return method

        def run(*args: Any) -> Any:
            answer = method(*args)
            _sync()
            return answer

        return run

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        yield
        _sync()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any) -> Any:
        answer = super().optimizer_step(optimizer, closure, **kwargs)
        _sync()
        return answer

    # ---- state

    def model_state(self, module: LightningModule) -> dict[str, Any]:
        state: dict[str, Any] = _on_cpu(super().model_state(module))
        return state

    def optimizer_state(self, module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = _on_cpu(super().optimizer_state(module, optimizer))
        return state


class SingleDeviceXLAStrategy(_XLA):
    """One process on one XLA device. `debug` sets PT_XLA_DEBUG, with which torch_xla tells what it compiles and why."""

    name = "single_xla"

    def __init__(
        self,
        *,
        device: torch.device | str | int = 0,
        accelerator: Accelerator | None = None,
        debug: bool = False,
    ) -> None:
        super().__init__(debug=debug)
        if device not in (0, "xla", "xla:0", torch.device("xla", 0)):
            raise MisconfigurationException(
                f"device: {device!r}; a process has one XLA device, which is 0. Choose with TPU_VISIBLE_CHIPS"
            )
        if accelerator is not None:
            self.accelerator = accelerator


class XLAStrategy(_XLA, ParallelStrategy):
    """One process a device; gradients are averaged at the end of the backward pass, as a part of the step's graph.

    `sync_module_states`: ranks start from rank 0's weights. `timeout`, `start_method`, `precision_plugin`: see
    ParallelStrategy. What is small (logged values, broadcasts) goes between the processes by gloo. Processes whose devices
    do not see one another, as with PJRT_DEVICE=CPU, average their gradients by gloo too.
    """

    name = "xla"

    def __init__(self, *, debug: bool = False, sync_module_states: bool = True, **kwargs: Any) -> None:
        super().__init__(debug=debug, **kwargs)
        self.sync_module_states = sync_module_states
        self._syncs = True
        self._in_graph = False

    @property
    def default_backend(self) -> str:
        return "gloo"

    def _join_devices(self) -> None:
        if self.world_size == 1:
            return
        import torch_xla.runtime as xr

        from torch_xla._internal import pjrt  # isort: skip - what torch_xla's rendezvous does under torchrun

        pjrt.initialize_multiprocess(self.local_rank, self.place.local_world_size)
        self._in_graph = xr.world_size() == self.world_size
        if xr.world_size() not in (1, self.world_size):
            raise MisconfigurationException(
                f"devices: XLA joins {xr.world_size()} devices, and there are {self.world_size} processes; start one "
                "process for each device of each host"
            )

    def setup(self, module: LightningModule, *, training: bool) -> None:
        if self.layer_sync is not None and self.world_size > 1:
            raise MisconfigurationException(
                "sync_batchnorm: not on XLA, whose devices have no SyncBatchNorm; leave it out"
            )
        super().setup(module, training=training)
        if training and self.sync_module_states and self.world_size > 1:
            with torch.no_grad():
                for tensor in (*module.parameters(), *module.buffers()):
                    sent = tensor.detach().cpu().contiguous()
                    torch.distributed.broadcast(sent, src=0)
                    tensor.copy_(sent)
            _sync()

    # ---- a step

    def backward(self, module: LightningModule, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(module, loss, *args, **kwargs)
        if self._syncs and self.world_size > 1:
            self._average([p.grad for p in module.parameters() if p.grad is not None])

    def _average(self, gradients: list[torch.Tensor]) -> None:
        """In place, so that clipping and hooks see what the optimizer does."""
        if self._in_graph:
            import torch_xla.core.xla_model as xm

            xm.all_reduce(xm.REDUCE_SUM, gradients, scale=1 / self.world_size)
            return
        copies = [gradient.cpu() for gradient in gradients]
        for kind in {copy.dtype for copy in copies}:
            flat = torch.cat([copy.flatten() for copy in copies if copy.dtype == kind])
            torch.distributed.all_reduce(flat)
            sizes = [copy.numel() for copy in copies if copy.dtype == kind]
            parts = iter(torch.split(flat.div_(self.world_size), sizes))
            for gradient in gradients:
                if gradient.dtype == kind:
                    gradient.copy_(next(parts).view_as(gradient))

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self._syncs = False
        try:
            with super().no_sync():
                yield
        finally:
            self._syncs = True

    # ---- between the ranks

    def reduce_values(self, values: torch.Tensor, op: str, group: Any = None) -> torch.Tensor:
        import torch.distributed as dist

        out = values.detach().to("cpu", copy=True)
        kind = {"mean": "SUM", "sum": "SUM", "min": "MIN", "max": "MAX", "product": "PRODUCT"}[op]
        dist.all_reduce(out, op=getattr(dist.ReduceOp, kind), group=group)
        return (out / dist.get_world_size(group) if op == "mean" else out).to(values.device)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """By way of the CPU, through which gradients find their way back."""
        return super().all_gather(tensor.cpu(), group, sync_grads).to(tensor.device)


def _sync() -> None:
    import torch_xla

    torch_xla.sync()


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    return [_on_cpu(each) for each in value] if type(value) is list else value
