"""The seam between the loop and the numbers it computes in. The base class is 32 bit: nothing to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer


class Precision:
    """`lightning.pytorch.plugins.precision.Precision`, reduced to what the loops call."""

    name: str = "32-true"
    has_context: bool = False
    """Whether `forward_context` does anything: the loop leaves it out where it does not, for it costs microseconds."""

    @property
    def precision(self) -> str:
        """Lightning's name for `name`."""
        return self.name

    def connect(self, device: torch.device) -> None:
        """The strategy tells on which device the module will be. Before everything else, possibly several times."""

    def init_context(self) -> AbstractContextManager[Any]:
        """Around the making of layers in configure_model and Trainer.init_module: the default dtype."""
        return contextlib.nullcontext()

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Before the module is moved and wrapped."""
        return module

    def convert_input(self, batch: Any) -> Any:
        """After the batch is on its device: casts floating point tensors where the module's dtype is another one."""
        return batch

    def forward_context(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around all four *_step methods."""
        return contextlib.nullcontext()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """What is given to backward."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """After the last backward of a step: gradients are true ones from here on (hooks, clipping).

        May be called several times before the step.
        """

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Run `closure` (forward, backward, unscale, hooks, clipping; returns the loss or None) and step."""
        return optimizer.step(closure=closure, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives; kept in checkpoints under Lightning's key (`MixedPrecision`: the scaler)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`. An empty one is of a run in another precision: nothing to take over."""
