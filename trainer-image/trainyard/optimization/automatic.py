"""Automatic optimization: forward, backward and step for one batch."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from trainyard.core.module import LightningModule
from trainyard.errors import MisconfigurationException
from trainyard.loops.steps import make_step, positional
from trainyard.plugins.precision.base import Precision
from trainyard.strategies.base import Step, Strategy

if TYPE_CHECKING:
    from trainyard.data.sampler import Batch
    from trainyard.loops.hooks import HookCaller
    from trainyard.trainer.trainer import Trainer


class AutomaticOptimization:
    """One optimizer, that steps after the batches that `Batch.steps` names.

    What a module, precision or strategy does not override is called without the detour: the detour costs more than
    the rest of the loop.
    """

    def __init__(self, trainer: Trainer, call: HookCaller) -> None:
        self.trainer, self.call = trainer, call
        self.module, self.state = trainer.lightning_module, trainer.loop_state
        self.strategy, self.precision = trainer.strategy, trainer.strategy.precision
        self.outputs: Any = None
        """Of the newest training_step, its loss detached."""
        self.window_open = False
        """A backward pass has run since the last optimizer step."""
        self._step = training_step(trainer, call)
        self._plain = _is_plain(trainer) and not call.profiles
        self._own_zero_grad = overrides(self.module, "optimizer_zero_grad") or call.profiles
        own_backward = overrides(self.module, "backward") or not self.strategy.plain_backward
        self._own_backward = own_backward or call.profiles
        name = f"[LightningModule]{type(self.module).__name__}"
        self._optimizer_step = call.profiled(f"{name}.optimizer_step", self.module.optimizer_step)
        self._zero_grad = call.profiled(f"{name}.optimizer_zero_grad", self.module.optimizer_zero_grad)
        self._backward = call.profiled(
            f"[Strategy]{type(self.strategy).__name__}.backward", self.strategy.backward
        )
        self._clips = bool(trainer.gradient_clip_val) or any(
            overrides(self.module, name) for name in ("configure_gradient_clipping", "clip_gradients")
        )
        self._rescue = trainer.rescue
        self._own_step = overrides(self.module, "optimizer_step")
        self._plan: Batch
        self._batch: Any = None
        self._index = 0

    def run(self, plan: Batch, batch: Any, index: int) -> None:
        """Forward, backward, and the optimizer's step if the batch completes one."""
        self._plan, self._batch, self._index = plan, batch, index
        try:
            if not plan.steps:
                with self.strategy.no_sync():
                    self.closure()
                return
            optimizer = self.trainer.optimizers[0]
            if self._plain:
                self.closure()
                optimizer.step()
            else:
                metrics = self.trainer.metrics
                if (
                    self._rescue is not None and self._own_step
                ):  # nobody knows what it does before its closure
                    self._rescue.changes()
                before, metrics.hook = metrics.hook, "optimizer_step"
                self._optimizer_step(self.state.epoch, index, optimizer, self.closure)
                metrics.hook = before
        finally:
            self._batch = None  # nothing holds on to a batch that has been used
        if plan.steps:
            self.state.step += 1
            self.state.stepped += 1

    def closure(self) -> torch.Tensor | None:
        """What `optimizer.step(closure)` calls; LBFGS calls it several times."""
        plan, module, call = self._plan, self.module, self.call
        optimizer = self.trainer.optimizers[0]
        loss = self.forward(plan)
        if not self.window_open:
            call("on_before_zero_grad", optimizer)
            if self._own_zero_grad:
                self._zero_grad(self.state.epoch, self._index, optimizer)
            else:
                optimizer.zero_grad()
        if loss is not None:
            call("on_before_backward", loss)
            loss = self.precision.scale(loss)
            if self._own_backward:
                self._backward(module, loss)
            else:
                loss.backward()  # type: ignore[no-untyped-call]
            call("on_after_backward")
        self.window_open = not plan.steps
        if plan.steps:
            self.precision.unscale(optimizer)
            call("on_before_optimizer_step", optimizer)
            if self._clips:
                self._clip(optimizer)
            if self._rescue is not None:  # last of all: the optimizer's own work comes next
                self._rescue.changes()
        return loss

    def forward(self, plan: Batch) -> torch.Tensor | None:
        """The loss, weighted so that the gradients add up to that of the mean over all samples of the step."""
        output = self._step(self._batch, self._index)
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, torch.Tensor):
            self.outputs = output
            return self._no_loss(loss)
        detached = loss.detach()
        self.outputs = {**output, "loss": detached} if isinstance(output, dict) else {"loss": detached}
        if not plan.padding:
            self.trainer.last_loss = detached
        share = plan.weight
        if share == 1:
            return loss
        # In one operation, as somebody would write it by hand: loss / 4, not loss * 0.25.
        return loss / share.denominator if share.numerator == 1 else loss * float(share)

    def _no_loss(self, loss: Any) -> None:
        if loss is not None:
            raise MisconfigurationException(
                f"training_step must return a tensor, a dict with 'loss', or None; its loss is a {type(loss).__name__}"
            )
        if self.trainer.world_size > 1:
            raise MisconfigurationException(
                "training_step returned no loss: with several processes the others would wait for its gradients for "
                "ever. Return a loss that is multiplied by 0 instead"
            )

    def _clip(self, optimizer: Any) -> None:
        trainer, metrics = self.trainer, self.trainer.metrics
        before, metrics.hook = metrics.hook, "configure_gradient_clipping"
        self.module.configure_gradient_clipping(
            optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        )
        metrics.hook = before


def training_step(trainer: Trainer, call: HookCaller) -> Step:
    """`training_step(batch, index)`."""
    takes_index = positional(trainer.lightning_module.training_step) >= 2
    return make_step(trainer, call, "training_step", 2 if takes_index else 1)


def overrides(module: LightningModule, name: str) -> bool:
    """Whether `module` has a method of its own for what LightningModule has one."""
    return getattr(getattr(module, name), "__func__", None) is not getattr(LightningModule, name)


def _is_plain(trainer: Trainer) -> bool:
    """Whether `optimizer.step()` after the closure does what `optimizer_step(..., closure)` would."""
    if overrides(trainer.lightning_module, "optimizer_step"):
        return False
    if type(trainer.strategy).optimizer_step is not Strategy.optimizer_step:
        return False
    if type(trainer.strategy.precision).optimizer_step is not Precision.optimizer_step:
        return False
    closure = inspect.signature(trainer.optimizers[0].step).parameters.get("closure")
    return closure is not None and closure.default is None
