"""In which order the Trainer keeps its callbacks. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from trainyard.callbacks.base import Callback
from trainyard.callbacks.checkpoint import Checkpoint

_TUNERS = ("BatchSizeFinder", "LearningRateFinder")


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """As given, but tuners first and writers of checkpoints last (Lightning's order)."""
    return sorted(callbacks, key=lambda c: 0 if _is_tuner(c) else 2 if isinstance(c, Checkpoint) else 1)


def monitors(callback: Callback) -> bool:
    """Whether its on_train_epoch_end comes after the module's, which may log what it watches."""
    return isinstance(callback, Checkpoint) or _is(callback, "EarlyStopping")


def _is_tuner(callback: Callback) -> bool:
    return _is(callback, *_TUNERS)


def _is(callback: Callback, *names: str) -> bool:
    """By the names of its classes: their modules are not imported for this."""
    return any(kind.__name__ in names for kind in type(callback).__mro__)
