"""What DeepSpeed's engine computes in. It casts the weights and scales the loss itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from trainyard.plugins.precision.base import Precision
from trainyard.plugins.precision.dtypes import cast_floats, default_dtype

if TYPE_CHECKING:
    from torch.optim import Optimizer

_DTYPES = {
    "16-mixed": torch.float16, "16-true": torch.float16, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16,
}  # fmt: skip
_OWN = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's DynamicLossScaler."""


class DeepSpeedPrecision(Precision):
    """Weights and inputs in 16 bit, and weights in 32 bit that the optimizer updates: for "-mixed" and "-true" alike.

    With "-true" new tensors and layers are in 16 bit as well. There is no autocast.
    """

    def __init__(self, precision: str = "32-true") -> None:
        self.name = precision
        self.dtype = _DTYPES.get(precision, torch.float32)
        self.has_context = precision in ("16-true", "bf16-true")
        self.loss_scaler: Any = None
        """The engine's, once there is one."""

    def init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.dtype) if self.has_context else nullcontext()

    def forward_context(self, device: torch.device) -> AbstractContextManager[Any]:
        return self.init_context()

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Where there is no engine to do it. Buffers keep their digits, as with the engine."""
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype)
        return module

    def convert_input(self, batch: Any) -> Any:
        return batch if self.dtype == torch.float32 else cast_floats(batch, self.dtype)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any) -> Any:
        raise NotImplementedError("the engine steps: see DeepSpeedStrategy.optimizer_step")

    def state_dict(self) -> dict[str, Any]:
        """Of the loss scaler, with torch.amp.GradScaler's keys beside its own: a run can go on without DeepSpeed."""
        scaler = self.loss_scaler
        if scaler is None or not getattr(scaler, "dynamic", False):
            return {}
        return {
            **{name: getattr(scaler, name) for name in _OWN},
            "scale": float(scaler.cur_scale), "growth_factor": float(scaler.scale_factor),
            "backoff_factor": 1 / float(scaler.scale_factor), "growth_interval": int(scaler.scale_window),
            "_growth_tracker": (scaler.cur_iter - scaler.last_overflow_iter - 1) % int(scaler.scale_window),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        scaler = self.loss_scaler
        if scaler is None or not state or not getattr(scaler, "dynamic", False):
            return
        if "cur_scale" in state:
            for name in _OWN:
                setattr(scaler, name, state[name])
        else:  # of a GradScaler
            scaler.cur_scale = float(state["scale"])
            scaler.cur_iter, scaler.last_overflow_iter = int(state["_growth_tracker"]), -1
