"""Automatic optimization by virtual ranks: the same step, bit for bit, on any number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trainyard.data.virtual import block
from trainyard.determinism import seed_between
from trainyard.errors import MisconfigurationException
from trainyard.optimization.automatic import AutomaticOptimization
from trainyard.optimization.exchange import Exchange, Gradients, add
from trainyard.optimization.fold import Fold

if TYPE_CHECKING:
    from trainyard.loops.hooks import HookCaller
    from trainyard.trainer.trainer import Trainer


class VirtualOptimization(AutomaticOptimization):
    """A process goes through its virtual ranks one after the other.

    Each of them begins with no gradients, and with the buffers as they were before the step. What the first virtual rank
    makes of the buffers is what they are after it, as with DistributedDataParallel. The gradients of a virtual rank's
    batches add up in their order, those of the virtual ranks along the tree of `fold`.
    """

    def __init__(self, trainer: Trainer, call: HookCaller) -> None:
        super().__init__(trainer, call)
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "deterministic='elastic' cannot be used with LBFGS: it evaluates the loss of a step several times"
            )
        strategy, virtual = trainer.strategy, trainer.strategy.virtual_ranks
        assert virtual is not None  # noqa: S101 - or it would be another class
        self._exchange = Exchange(strategy.global_rank, strategy.world_size, virtual)
        self._fold: Fold[Gradients] = Fold(virtual, add)
        self._ranks = block(strategy.global_rank, strategy.world_size, virtual)
        self._next = 0
        self._opened: tuple[int, int] | None = None
        """Epoch and position of the step that is being computed."""
        self._at: int | None = None
        """The virtual rank that is being computed."""
        self._parameters: list[torch.nn.Parameter] = []
        self._buffers: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []
        self._after: list[torch.Tensor] = []

    def closure(self) -> torch.Tensor | None:
        plan, call = self._plan, self.call
        optimizer = self.trainer.optimizers[0]
        key = (self.state.epoch, plan.start)
        begins = self._opened != key
        if begins:
            self._begin()
            self._opened = key
        if plan.padding:  # this process has no sample in this step
            loss = None
        else:
            self._turn_to(plan.virtual)
            loss = self.forward(plan)
        if begins:
            call("on_before_zero_grad", optimizer)
            if self._own_zero_grad:
                self._zero_grad(self.state.epoch, self._index, optimizer)
            else:
                optimizer.zero_grad()
            for parameter in self._parameters:  # if it zeroes them only
                parameter.grad = None
        if loss is not None:
            call("on_before_backward", loss)
            loss = self.precision.scale(loss)
            if self._own_backward:
                self._backward(self.module, loss)
            else:
                loss.backward()  # type: ignore[no-untyped-call]
        if plan.steps:
            self._reduce()
        if loss is not None:
            call("on_after_backward")
        self.window_open = not plan.steps
        if plan.steps:
            self.precision.unscale(optimizer)
            call("on_before_optimizer_step", optimizer)
            if self._clips:
                self._clip(optimizer)
        return loss

    def _no_loss(self, loss: Any) -> None:
        """Nobody waits for this virtual rank's gradients alone: without a loss it adds nothing."""
        if loss is not None:
            super()._no_loss(loss)

    # ---- a step

    def _begin(self) -> None:
        self._fold.take()  # of a step that was left in the middle
        self._at, self._next = None, self._ranks.start
        seen: dict[int, torch.nn.Parameter] = {}
        for group in self.trainer.optimizers[0].param_groups:
            seen.update({id(p): p for p in group["params"] if p.requires_grad})
        self._parameters = list(seen.values())
        self._buffers = list(self.module.buffers())
        self._before = [b.detach().clone() for b in self._buffers]
        self._after = []

    def _turn_to(self, virtual: int | None) -> None:
        if virtual != self._at:
            self._close()
            self._at = virtual

    def _close(self) -> None:
        """The virtual rank's batches are through: its gradients into the tree, the buffers back for the next one."""
        if self._at is None:
            return
        self._fill(self._at)
        self._put([parameter.grad for parameter in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None
        if self._at == 0:
            self._after = [b.detach().clone() for b in self._buffers]
        _copy(self._before, self._buffers)
        self._at = None

    def _put(self, gradients: list[torch.Tensor | None]) -> None:
        """Of the next leaf."""
        if any(g is not None and g.is_sparse for g in gradients):
            raise MisconfigurationException(
                "deterministic='elastic' does not add up sparse gradients; make the Embedding with sparse=False"
            )
        tensors = [
            torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, gradients, strict=True)
        ]
        leaf, self._next = self._next, self._next + 1
        self._fold.put((leaf, leaf + 1), Gradients(tensors, [g is not None for g in gradients]))

    def _fill(self, until: int) -> None:
        """At an epoch's end some virtual ranks have no batch: they add nothing."""
        while self._next < until:
            self._put([None] * len(self._parameters))

    def _reduce(self) -> None:
        """From what the virtual ranks of this process have to the step's gradients and buffers. Collective."""
        self._close()
        self._fill(self._ranks.stop)
        total = self._exchange.total(self._fold.take())
        for parameter, gradient, used in zip(self._parameters, total.tensors, total.used, strict=True):
            parameter.grad = gradient if used else None
        buffers = self._after or self._before
        self.trainer.strategy.broadcast_tensors(buffers)
        _copy(buffers, self._buffers)
        self._before = self._after = []
        self._opened = None
        self.trainer.metrics.enter(None, self.state.step)
        seed_between(self.state, "step")


def _copy(source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for before, now in zip(source, target, strict=True):
            now.copy_(before)
