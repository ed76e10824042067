"""Weights in 32 bit, matrix products in 16, and the loss scaled where 16 bit would lose small gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.plugins.precision.base import Precision

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class MixedPrecision(Precision):
    """`precision="16-mixed"` or `"bf16-mixed"`: torch.autocast, and for float16 torch.amp.GradScaler.

    `device` ("cuda", "cpu", ...) is the strategy's if it is None. bfloat16 has float32's range and needs no scaler. A step
    whose gradients hold an inf or NaN leaves the weights as they were; it counts as a step for schedulers and
    `global_step`, as in Lightning. Raises MisconfigurationException.
    """

    has_context = True

    def __init__(
        self, precision: str = "16-mixed", device: str | None = None, scaler: GradScaler | None = None
    ) -> None:
        if precision not in _DTYPES:
            raise MisconfigurationException(
                f"precision: {precision!r} is neither '16-mixed' nor 'bf16-mixed'"
            )
        if precision == "bf16-mixed" and scaler is not None:
            raise MisconfigurationException(
                "scaler: precision='bf16-mixed' scales nothing; leave it out, or use precision='16-mixed'"
            )
        self.name = precision
        self.dtype = _DTYPES[precision]
        self.device = device
        self._scaler = scaler
        self._scaled = False
        """A loss was scaled since the run began."""
        self._unscaled: set[int] = set()
        """Optimizers whose gradients are true ones since the last step."""
        self._stepped: set[int] = set()
        """Optimizers that stepped since the scaler was last updated."""
        if device is not None:
            self.connect(torch.device(device))

    @property
    def scaler(self) -> GradScaler | None:
        """None for bfloat16, and before the device is known."""
        return self._scaler

    def connect(self, device: torch.device) -> None:
        self.device = self.device or device.type
        if self._scaler is None and self.dtype == torch.float16:
            self._scaler = torch.amp.GradScaler(self.device)

    def forward_context(self, device: torch.device) -> AbstractContextManager[Any]:
        # No cache: it holds the casts of all weights until the step is over, for weights that are used once mostly.
        return torch.autocast(device.type, dtype=self.dtype, cache_enabled=False)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        if self._scaler is None:
            return loss
        self._update()
        self._scaled = True
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        if self._scaler is None or id(optimizer) in self._unscaled or not _has_gradients(optimizer):
            return
        if not self._scaled:
            raise MisconfigurationException(
                "precision='16-mixed': an optimizer steps with gradients of a loss that was not scaled; call "
                "self.manual_backward(loss) instead of loss.backward()"
            )
        if id(optimizer) in self._stepped:
            self._update()
        self._scaler.unscale_(optimizer)
        self._unscaled.add(id(optimizer))

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Raises MisconfigurationException for LBFGS, which wants to evaluate the closure several times in a step."""
        if self._scaler is None:
            return super().optimizer_step(optimizer, closure, **kwargs)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "precision='16-mixed' cannot be used with LBFGS: it evaluates the loss several times in a step. Use "
                "precision='bf16-mixed' or 32"
            )
        answer = closure()
        if not _has_gradients(optimizer):
            return answer  # training_step returned no loss
        self.unscale(optimizer)
        self._scaler.step(optimizer, **kwargs)
        self._unscaled.discard(id(optimizer))
        self._stepped.add(id(optimizer))
        # A scheduler would warn that the optimizer has not stepped yet, if the first step was left out for an inf.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return answer

    def _update(self) -> None:
        """Take up a new scale, once per round of optimizers.

        Not after each step: with several optimizers the gradients of the second were made with the scale of the first.
        """
        if self._stepped and self._scaler is not None:
            self._scaler.update()
            self._stepped.clear()
            self._unscaled.clear()

    def state_dict(self) -> dict[str, Any]:
        """The scaler's. Waits for the device."""
        if self._scaler is None:
            return {}
        self._update()
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
