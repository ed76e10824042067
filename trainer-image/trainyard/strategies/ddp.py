"""Every process has the whole model; gradients are averaged while the backward pass runs."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException
from trainyard.strategies.base import Step
from trainyard.strategies.parallel import ParallelStrategy

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from trainyard.core.module import LightningModule

_OURS = {"self", "module", "device_ids", "output_device", "dim"}


class DDPStrategy(ParallelStrategy):
    """torch.nn.parallel.DistributedDataParallel.

    `ddp_comm_hook` is registered with `ddp_comm_state`, inside of `ddp_comm_wrapper` if there is one (gradient
    compression: torch.distributed.algorithms.ddp_comm_hooks). `timeout`, `process_group_backend`, `start_method`: see
    ParallelStrategy; all other arguments go to DistributedDataParallel. In a world of one nothing is wrapped. Raises
    MisconfigurationException for an argument that nobody knows.
    """

    name = "ddp"

    def __init__(
        self, *, find_unused_parameters: bool = False, static_graph: bool = False, gradient_as_bucket_view: bool = True,
        ddp_comm_state: object | None = None, ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None, model_averaging_period: int | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if model_averaging_period is not None:
            raise MisconfigurationException(
                "model_averaging_period: averaging the weights every few steps is not supported; leave it out"
            )
        for name, given in (("ddp_comm_state", ddp_comm_state), ("ddp_comm_wrapper", ddp_comm_wrapper)):
            if given is not None and ddp_comm_hook is None:
                raise MisconfigurationException(f"{name}: it does nothing without ddp_comm_hook")
        ours, theirs = _split(kwargs)
        super().__init__(**ours)
        self._hook, self._hook_state, self._hook_wrapper = ddp_comm_hook, ddp_comm_state, ddp_comm_wrapper
        # A hook may reduce among some of the ranks only (local SGD).
        self.replicates_parameters = ddp_comm_hook is None
        self._kwargs = {
            "find_unused_parameters": find_unused_parameters, "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view, **theirs,
        }  # fmt: skip
        self.takes_virtual_ranks = ddp_comm_hook is None
        self._ddp: DistributedDataParallel | None = None
        self._manual = False
        self._syncs = True

    @property
    def model(self) -> torch.nn.Module | None:
        """The DistributedDataParallel, in a fit."""
        return self._ddp or self._module

    def setup(self, module: LightningModule, *, training: bool) -> None:
        if training:
            self.apply_layer_sync(module)
        super().setup(module, training=training)
        if training and self.virtual_ranks:
            # Rank 0's weights, as DistributedDataParallel does; the loop adds up the gradients.
            self.broadcast_tensors([*module.parameters(), *module.buffers()])
        elif training and self.world_size > 1 and any(p.requires_grad for p in module.parameters()):
            self._wrap(module)

    def _wrap(self, module: LightningModule) -> None:
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device.index] if self.device.type != "cpu" else None
        self._ddp = DistributedDataParallel(_training_step_module(module), device_ids=ids, **self._kwargs)
        if self._hook is not None:
            hook = self._hook if self._hook_wrapper is None else self._hook_wrapper(self._hook)
            self._ddp.register_comm_hook(self._hook_state, hook)
        elif self.device.type == "cpu" and self.world_size > 2:
            _freeze_buckets(self._ddp)

    def step(self, module: LightningModule, name: str) -> Step:
        if name == "training_step" and self._ddp is not None:
            return self._manual_step if self._manual else self._wrapped_step
        return super().step(module, name)

    def trainable_changed(self, module: LightningModule) -> None:
        """DDP averages the gradients of those parameters only that required some when it was made."""
        if self._ddp is None:
            return
        import gc

        self._ddp = None
        gc.collect()  # its hooks, which would average again, go with it
        if any(p.requires_grad for p in module.parameters()):
            self._wrap(module)

    def begin_manual(self, module: LightningModule) -> None:
        self._manual = True

    def _wrapped_step(self, *args: Any) -> Any:
        """Another DDP may take this one's place within a fit."""
        ddp: Any = self._ddp
        return ddp(*args)

    def _manual_step(self, *args: Any) -> Any:
        """DDP prepares its reducer when forward returns: too late for a backward pass inside of it."""
        ddp: Any = self._ddp
        ddp.require_backward_grad_sync = False
        try:
            return ddp(*args)
        finally:
            ddp.require_backward_grad_sync = True

    def backward(self, module: LightningModule, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        ddp = self._ddp
        if self._manual and ddp is not None and self._syncs:
            from torch.nn.parallel.distributed import _find_tensors

            ddp.require_forward_param_sync = True
            searches = ddp.find_unused_parameters and not ddp.static_graph
            tensors = list(_find_tensors(loss)) if searches else []  # type: ignore[no-untyped-call]
            # Of what the backward pass before it has found out, or a second one in the first step would add to it.
            ddp.reducer._rebuild_buckets()
            ddp.reducer.prepare_for_backward(tensors)
        super().backward(module, loss, *args, **kwargs)

    def teardown(self, module: LightningModule) -> None:
        self._ddp, self._manual = None, False
        super().teardown(module)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        if self._ddp is None:
            yield
            return
        self._syncs = False
        try:
            with self._ddp.no_sync():
                yield
        finally:
            self._syncs = True

    def disconnect(self) -> None:
        self._ddp = None
        super().disconnect()


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ParallelStrategy takes, and what DistributedDataParallel takes. Raises MisconfigurationException."""
    from torch.nn.parallel import DistributedDataParallel

    base = set(inspect.signature(ParallelStrategy.__init__).parameters) - {"self"}
    ddp = set(inspect.signature(DistributedDataParallel.__init__).parameters) - _OURS
    for name in kwargs:
        if name not in base | ddp:
            near = difflib.get_close_matches(name, sorted(base | ddp), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise MisconfigurationException(
                f"{name}: neither DDPStrategy nor DistributedDataParallel takes it{hint}"
            )
    return {k: v for k, v in kwargs.items() if k in base}, {k: v for k, v in kwargs.items() if k not in base}


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
