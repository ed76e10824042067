"""Calls hooks: those that somebody overrides, and no others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.callbacks.order import monitors
from trainyard.core.hooks import ModelHooks

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer

Hook = Callable[..., Any]
_KEPT = frozenset(
    ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
     *(f"on_{stage}_batch_{moment}" for stage in ("train", "validation", "test", "predict") for moment in ("start", "end")))
)  # fmt: skip
"""Hooks of single batches: who overrides them is looked up once in an epoch."""


class HookCaller:
    """The callbacks' hooks in their order, then the module's (Lightning's order)."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._metrics = trainer.metrics
        self._kept: dict[str, tuple[Hook, ...]] = {}

    def refresh(self) -> None:
        """Callbacks may have come or gone, or methods been replaced."""
        self._kept.clear()

    def __call__(self, name: str, *args: Any) -> Any:
        """Returns the last answer that is not None."""
        hooks = self._kept.get(name)
        if hooks is None:
            hooks = self.find(name)
        if not hooks:
            return None
        answer = None
        metrics = self._metrics
        before, metrics.hook = metrics.hook, name
        try:
            for hook in hooks:
                said = hook(*args)
                if said is not None:
                    answer = said
        finally:
            metrics.hook = before
        return answer

    def find(self, name: str) -> tuple[Hook, ...]:
        """To be called with the module's arguments. What monitors a metric comes last at an epoch's end."""
        trainer, module = self._trainer, self._trainer.lightning_module
        hooks: list[Hook] = []
        later: list[Hook] = []
        for callback in trainer.callbacks:
            method = getattr(callback, name)
            if getattr(method, "__func__", None) is not getattr(Callback, name):
                action = f"[Callback]{type(callback).__qualname__}.{name}"
                after = name == "on_train_epoch_end" and monitors(callback)
                (later if after else hooks).append(self.profiled(action, partial(method, trainer, module)))
        own = getattr(module, name, None)
        if own is not None and getattr(own, "__func__", None) is not getattr(ModelHooks, name, None):
            hooks.append(self.profiled(f"[LightningModule]{type(module).__name__}.{name}", own))
        found = (*hooks, *later)
        if name in _KEPT:
            self._kept[name] = found
        return found

    def profiled(self, action: str, method: Hook) -> Hook:
        """`method` itself unless there is a profiler."""
        profiler = self._trainer.profiler
        if profiler is None:
            return method

        def timed(*args: Any, **kwargs: Any) -> Any:
            with profiler.profile(action):
                return method(*args, **kwargs)

        return timed
