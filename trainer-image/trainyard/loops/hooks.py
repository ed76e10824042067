"""Calls hooks: those that somebody overrides, and no others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from trainyard.callbacks.base import Callback
from trainyard.callbacks.order import monitors
from trainyard.core.hooks import ModelHooks
from trainyard.core.logging_methods import keep_out_of_graphs
from trainyard.profilers.passthrough import PassThroughProfiler

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer

Hook = Callable[..., Any]
Item = TypeVar("Item")
_END = object()
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
        """Callbacks may have come or gone, or methods been replaced, or compiled."""
        self._kept.clear()
        keep_out_of_graphs()

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
        if not self.profiles:
            return method
        profiler = self._trainer.profiler

        def timed(*args: Any, **kwargs: Any) -> Any:
            with profiler.profile(action):
                return method(*args, **kwargs)

        return timed

    def profiled_items(self, action: str, items: Iterator[Item]) -> Iterator[Item]:
        """`items` itself unless there is a profiler; then `action` is the wait for the next one."""
        return self._timed_items(action, items) if self.profiles else items

    def _timed_items(self, action: str, items: Iterator[Item]) -> Iterator[Item]:
        with contextlib.closing(items):  # type: ignore[type-var]
            while True:
                with self._trainer.profiler.profile(action):
                    item = next(items, _END)
                if item is _END:
                    return
                yield item  # type: ignore[misc]

    @property
    def profiles(self) -> bool:
        return not isinstance(self._trainer.profiler, PassThroughProfiler)
