"""Several processes, one device each, in a torch.distributed process group."""

from __future__ import annotations

import atexit
import contextlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.peers import Alone, GlooPeers
from trainyard.plugins.precision.base import Precision
from trainyard.strategies.base import Strategy

if TYPE_CHECKING:
    from trainyard.accelerators import Accelerator

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
START_METHODS = ("popen", "spawn", "fork", "forkserver")


class ParallelStrategy(Strategy):
    """`timeout` bounds a collective of the training itself, and the rendezvous.

    `process_group_backend` is the device's default if it is None (nccl, gloo). `start_method` says how a script that no
    launcher started gets its other processes. `accelerator` and `precision_plugin` win over the Trainer's; Lightning's
    `parallel_devices`, `cluster_environment` and `checkpoint_io` are the Trainer's business here. Raises
    MisconfigurationException.
    """

    launch = "popen"

    def __init__(
        self, *, timeout: timedelta | None = None, process_group_backend: str | None = None, start_method: str = "popen",
        accelerator: Accelerator | None = None, precision_plugin: Precision | None = None,
        parallel_devices: Any = None, cluster_environment: Any = None, checkpoint_io: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, given, instead in (
            ("parallel_devices", parallel_devices, "Trainer(devices=...)"),
            ("cluster_environment", cluster_environment, "torchrun's variables (RANK, WORLD_SIZE, ...)"),
            ("checkpoint_io", checkpoint_io, "Trainer(checkpoint=...)"),
        ):
            if given is not None:
                raise MisconfigurationException(
                    f"{name}: {type(self).__name__} does not take one; use {instead}"
                )
        if start_method not in START_METHODS:
            raise MisconfigurationException(
                f"start_method: {start_method!r} is none of {', '.join(START_METHODS)}"
            )
        if timeout is not None and not isinstance(timeout, timedelta):
            raise MisconfigurationException(f"timeout: {timeout!r} is not a datetime.timedelta")
        self.launch = start_method
        self.process_group_backend = process_group_backend
        self.timeout = timeout or COLLECTIVE_TIMEOUT
        self.given_precision = precision_plugin
        if accelerator is not None:
            self.accelerator = accelerator
        if precision_plugin is not None:
            self.precision = precision_plugin
        self._connected = False

    @property
    def default_backend(self) -> str:
        import torch.distributed as dist

        return str(dist.get_default_backend_for_device(self.device))

    def connect(self) -> None:
        import torch.distributed as dist

        super().connect()
        if not dist.is_initialized():
            index = self.device if self.device.type not in ("cpu", "mps", "xla") else None
            alone = self.world_size == 1 and not self.place.launched
            where: dict[str, Any] = {}
            if alone:  # no launcher has said where to meet, and there is nobody to be met
                where = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
            dist.init_process_group(
                self.process_group_backend or self.default_backend, timeout=self.timeout, device_id=index,
                **where,
            )  # fmt: skip
            self._connected = True
            atexit.register(self._at_exit)
        if isinstance(self.peers, Alone):
            self.peers = GlooPeers()

    def disconnect(self) -> None:
        import torch.distributed as dist

        if self._connected and dist.is_initialized():  # the script may have been quicker
            self.barrier()  # nobody tears down connections that another one still uses
            dist.destroy_process_group()
            self._connected, self.peers = False, Alone()

    def _at_exit(self) -> None:
        """Rank 0 may keep the store that the others still talk to: nobody goes before all are done. After a failure
        there is nobody to wait for."""
        if not self.failed:
            self.disconnect()

    def apply_layer_sync(self, module: torch.nn.Module) -> None:
        """`sync_batchnorm`: before the module is wrapped. A world of one has nothing to synchronise."""
        from trainyard.plugins.layer_sync import TorchSyncBatchNorm

        if isinstance(self.layer_sync, TorchSyncBatchNorm):
            self.layer_sync.on_cpu = self.device.type == "cpu"
        if self.layer_sync is not None and self.world_size > 1:
            self.layer_sync.apply(module)

    def teardown(self, module: Any) -> None:
        if self.layer_sync is not None:
            self.layer_sync.revert(module)

    # ---- between the ranks

    def reduce_values(self, values: torch.Tensor, op: str, group: Any = None) -> torch.Tensor:
        import torch.distributed as dist

        ops = {
            "mean": dist.ReduceOp.SUM,
            "sum": dist.ReduceOp.SUM,
            "min": dist.ReduceOp.MIN,
            "max": dist.ReduceOp.MAX,
            "product": dist.ReduceOp.PRODUCT,
        }
        out = values.detach().to(self.device, copy=True)
        dist.all_reduce(out, op=ops[op], group=group)
        return (out / dist.get_world_size(group) if op == "mean" else out).to(values.device)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        from trainyard.strategies.collectives import all_gather

        with contextlib.nullcontext() if sync_grads else torch.no_grad():
            return all_gather(tensor, group)

    def broadcast_tensors(self, tensors: list[torch.Tensor]) -> None:
        import torch.distributed as dist

        kinds: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors if self.world_size > 1 else ():
            kinds.setdefault(tensor.dtype, []).append(tensor)
        for alike in kinds.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
            dist.broadcast(flat.view(torch.uint8), src=0)
            with torch.no_grad():
                for tensor, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        import torch.distributed as dist

        if not isinstance(self.peers, GlooPeers):
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=src, group=self.peers.group)
        return box[0]
