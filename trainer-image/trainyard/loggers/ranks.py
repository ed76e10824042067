"""Only rank 0 logs. The other ranks run the same code and it does nothing there."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def is_rank_zero() -> bool:
    """By the process group if there is one, else by what torchrun set. Imports nothing."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return bool(dist.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"


def rank_zero_only(function: Callable[_P, _T]) -> Callable[_P, _T | None]:
    """`lightning.pytorch.utilities.rank_zero_only` of a method that returns nothing."""

    @functools.wraps(function)
    def on_rank_zero(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        return function(*args, **kwargs) if is_rank_zero() else None

    return on_rank_zero


def rank_zero_experiment(function: Callable[[Any], _T]) -> Callable[[Any], _T]:
    """`lightning.pytorch.loggers.logger.rank_zero_experiment`: on other ranks a DummyExperiment, so that
    `self.logger.experiment.add_image(...)` in a module runs on all ranks and writes on one."""

    @functools.wraps(function)
    def experiment(self: Any) -> Any:
        if is_rank_zero():
            return function(self)
        from trainyard.loggers.dummy import DummyExperiment

        return DummyExperiment()

    return experiment
