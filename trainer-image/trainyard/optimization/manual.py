"""Manual optimization: the module's training_step runs backward and steps its optimizers itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.optimization.automatic import training_step

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainyard.data.sampler import Batch
    from trainyard.loops.hooks import HookCaller
    from trainyard.trainer.trainer import Trainer


class ManualOptimization:
    """Runs training_step; what steps in it counts itself."""

    window_open = False
    """Nobody can tell: a batch without a step is taken for one that is complete."""

    def __init__(self, trainer: Trainer, call: HookCaller) -> None:
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                "gradient_clip_val: with manual optimization, call self.clip_gradients(opt, gradient_clip_val=...) in "
                "training_step instead"
            )
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "accumulate_grad_batches: with manual optimization, training_step decides when an optimizer steps"
            )
        self.trainer, self.call = trainer, call
        self.outputs: Any = None
        trainer.strategy.begin_manual(trainer.lightning_module)
        self._step = training_step(trainer, call)

    def run(self, plan: Batch, batch: Any, index: int) -> None:
        """`LoopState.stepped` goes up if at least one optimizer stepped."""
        state, rescue = self.trainer.loop_state, self.trainer.rescue
        if rescue is not None:  # a training_step may step optimizers, and change weights, at any point
            rescue.changes()
        before = state.step
        output = self._step(batch, index)
        if isinstance(output, torch.Tensor):
            output = {"loss": output.detach()}
        elif isinstance(output, dict):
            output = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in output.items()}
        elif output is not None:
            raise MisconfigurationException(
                f"training_step must return a tensor, a dict or None; it returned a {type(output).__name__}"
            )
        self.outputs = output
        if isinstance(output, dict) and isinstance(output.get("loss"), torch.Tensor):
            self.trainer.last_loss = output["loss"]
        state.stepped += state.step > before


class LightningOptimizer:
    """What `LightningModule.optimizers()` gives: the optimizer, whose step counts and runs the hooks.

    Everything else is the wrapped optimizer's. Source: `lightning.pytorch.core.optimizer.LightningOptimizer`.
    """

    def __init__(self, optimizer: Optimizer, trainer: Trainer) -> None:
        self._optimizer = optimizer
        self._trainer = trainer

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def __repr__(self) -> str:
        return f"Lightning{self._optimizer!r}"

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """One global step. `closure` does what it does for the wrapped optimizer."""
        trainer, optimizer = self._trainer, self._optimizer
        precision, call = trainer.strategy.precision, trainer.hooks

        def whole() -> Any:
            answer = None
            if closure is not None:
                with torch.enable_grad():
                    answer = closure()
            precision.unscale(optimizer)
            call("on_before_optimizer_step", optimizer)
            return answer

        answer = trainer.strategy.optimizer_step(optimizer, whole, **kwargs)
        trainer.loop_state.step += 1
        return answer

    @contextlib.contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Only this optimizer's parameters require gradients in here; `sync_grad=False` leaves them unsynchronised."""
        module = self._trainer.lightning_module
        sync = contextlib.nullcontext() if sync_grad else self._trainer.strategy.no_sync()
        with sync, module.toggled_optimizer(self):
            yield
