"""The module's *_step methods, as the loops call them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.loops.hooks import HookCaller
    from trainyard.strategies.base import Step
    from trainyard.trainer.trainer import Trainer


def make_step(trainer: Trainer, call: HookCaller, name: str, count: int) -> Step:
    """The module's method `name` with the first `count` arguments: by the strategy, in its precision, with `self.log`
    allowed, and profiled."""
    strategy, metrics = trainer.strategy, trainer.metrics
    precision = strategy.precision
    run = strategy.step(trainer.lightning_module, name)
    run = call.profiled(f"[Strategy]{type(strategy).__name__}.{name}", run)

    def step(*args: Any) -> Any:
        before, metrics.hook = metrics.hook, name
        try:
            if precision.has_context:
                with precision.forward_context(strategy.device):
                    return run(*args[:count])
            return run(*args[:count])
        finally:
            metrics.hook = before

    return step


def positional(function: Any) -> int:
    """How many positional arguments it takes; many if it takes any. Raises MisconfigurationException for Lightning's other
    flavour of steps, which fetch their batches themselves."""
    parameters = inspect.signature(function).parameters
    if "dataloader_iter" in parameters:
        raise MisconfigurationException(
            f"{function.__name__}(dataloader_iter) is not supported: take (batch, batch_idx), or give fit a loader of your own"
        )
    kinds = [p.kind for p in parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 99
    return sum(
        k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds
    )
