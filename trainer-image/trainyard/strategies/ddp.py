"""Every process has the whole model; gradients are averaged while the backward pass runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trainyard.peers import GlooPeers
from trainyard.strategies.base import Step, Strategy

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from trainyard.core.module import LightningModule

COLLECTIVE_TIMEOUT = timedelta(seconds=60)


class DDPStrategy(Strategy):
    """torch.nn.parallel.DistributedDataParallel; further arguments go there.

    `timeout` bounds a collective of the training itself, and the rendezvous.
    """

    name = "ddp"
    launch = "popen"

    def __init__(
        self, *, timeout: timedelta = COLLECTIVE_TIMEOUT, process_group_backend: str | None = None,
        find_unused_parameters: bool = False, static_graph: bool = False, gradient_as_bucket_view: bool = True,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self._timeout = timeout
        self._backend = process_group_backend
        self._kwargs = {
            "find_unused_parameters": find_unused_parameters, "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view, **kwargs,
        }  # fmt: skip
        self._ddp: DistributedDataParallel | None = None
        self._connected = False

    def connect(self) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            cuda = self.device.type == "cuda"
            dist.init_process_group(
                self._backend or ("nccl" if cuda else "gloo"), timeout=self._timeout,
                device_id=self.device if cuda else None,
            )  # fmt: skip
            self._connected = True
        self.peers = GlooPeers()

    def setup(self, module: LightningModule, *, training: bool) -> None:
        import torch
        from torch.nn.parallel import DistributedDataParallel

        super().setup(module, training=training)
        if not training or not any(p.requires_grad for p in module.parameters()):
            return
        ids = [self.device.index] if self.device.type == "cuda" else None
        self._ddp = DistributedDataParallel(_training_step_module(module), device_ids=ids, **self._kwargs)
        if self.device.type == "cpu" and torch.distributed.get_world_size() > 2:
            _freeze_buckets(self._ddp)

    def step(self, module: LightningModule, name: str) -> Step:
        if name == "training_step" and self._ddp is not None:
            return self._ddp
        return super().step(module, name)

    def teardown(self, module: LightningModule) -> None:
        self._ddp = None

    def no_sync(self) -> AbstractContextManager[Any]:
        return super().no_sync() if self._ddp is None else self._ddp.no_sync()

    def reduce(self, values: torch.Tensor, op: str, group: Any = None) -> torch.Tensor:
        import torch.distributed as dist

        ops = {
            "mean": dist.ReduceOp.SUM,
            "sum": dist.ReduceOp.SUM,
            "min": dist.ReduceOp.MIN,
            "max": dist.ReduceOp.MAX,
        }
        out = values.clone()
        dist.all_reduce(out, op=ops[op], group=group)
        return out / dist.get_world_size(group) if op == "mean" else out

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        import torch
        import torch.distributed as dist
        from torch.distributed.nn.functional import all_gather

        if sync_grads:
            return torch.stack(all_gather(tensor, group or dist.group.WORLD))
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    def disconnect(self) -> None:
        import torch.distributed as dist

        self._ddp = None
        if self._connected:
            self.barrier()  # nobody tears down connections that another one still uses
            dist.destroy_process_group()
            self._connected = False


def _training_step_module(module: LightningModule) -> torch.nn.Module:
    """DDP prepares its reducer in forward(), so forward must be the training step."""
    import torch

    class TrainingStep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> Any:
            return self.module.training_step(*args)

    return TrainingStep()


def _freeze_buckets(ddp: DistributedDataParallel) -> None:
    """Have the final buckets from the first step on.

    DDP arranges its buckets anew after the first backward pass of each process. gloo adds up a bucket in pieces, each in
    an order of the ranks that depends on where in the bucket it lies: with more than two ranks the first step after a
    resume would differ in the last bits from the same step of an unbroken run.
    """
    reducer = ddp.reducer
    if ddp.find_unused_parameters or not hasattr(reducer, "_push_all_rebuilt_params"):
        return
    reducer._push_all_rebuilt_params()
    reducer._rebuild_buckets()
