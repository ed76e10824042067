"""What a fit has in the place of an optimizer when `configure_optimizers` returned None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class NoOptimizer(torch.optim.Optimizer):
    """Its step runs the closure, and changes nothing; it has no state."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)], {"lr": 0.0})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """There is none."""
