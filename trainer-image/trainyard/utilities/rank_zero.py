"""Said or done once, however many processes there are."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("trainyard")


class LightningDeprecationWarning(DeprecationWarning):
    """Of what this library will drop."""


class _RankZeroOnly:
    """`@rank_zero_only`, and `rank_zero_only.rank`, which may be set and follows the environment until it is."""

    def __init__(self) -> None:
        self._rank: int | None = None

    @property
    def rank(self) -> int:
        return _rank() if self._rank is None else self._rank

    @rank.setter
    def rank(self, rank: int | None) -> None:
        self._rank = rank

    def __call__(self, function: Callable[P, T], default: Any = None) -> Callable[P, T]:
        """`function`, called on rank 0 only; elsewhere `default` is returned."""

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            return function(*args, **kwargs) if self.rank == 0 else default

        return wrapped


rank_zero_only = _RankZeroOnly()


def _rank() -> int:
    """As torch.distributed has it once it is up, before that as the launcher's variables say."""
    import sys

    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def rank_prefixed_message(message: str, rank: int | None) -> str:
    return message if rank is None else f"[rank: {rank}] {message}"


@rank_zero_only
def rank_zero_debug(*args: Any, stacklevel: int = 2, **kwargs: Any) -> None:
    """logging.debug of the library's logger."""
    log.debug(*args, stacklevel=stacklevel + 1, **kwargs)


@rank_zero_only
def rank_zero_info(*args: Any, stacklevel: int = 2, **kwargs: Any) -> None:
    """logging.info of the library's logger."""
    log.info(*args, stacklevel=stacklevel + 1, **kwargs)


@rank_zero_only
def rank_zero_warn(
    message: str | Warning, stacklevel: int = 4, category: type[Warning] = UserWarning, **kwargs: Any
) -> None:
    """warnings.warn, as if from the caller."""
    warnings.warn(message, stacklevel=max(2, stacklevel - 1), category=category)


def rank_zero_deprecation(message: str | Warning, stacklevel: int = 5, **kwargs: Any) -> None:
    """Warn on rank 0 with a LightningDeprecationWarning."""
    rank_zero_warn(message, stacklevel=stacklevel, category=LightningDeprecationWarning)


class WarningCache(set[str]):
    """Each message once."""

    def warn(self, message: str, stacklevel: int = 5, **kwargs: Any) -> None:
        if message not in self:
            self.add(message)
            rank_zero_warn(message, stacklevel=stacklevel, **kwargs)

    def deprecation(self, message: str, stacklevel: int = 6, **kwargs: Any) -> None:
        if message not in self:
            self.add(message)
            rank_zero_deprecation(message, stacklevel=stacklevel, **kwargs)

    def info(self, message: str, stacklevel: int = 5, **kwargs: Any) -> None:
        if message not in self:
            self.add(message)
            rank_zero_info(message, stacklevel=stacklevel, **kwargs)


__all__ = [
    "LightningDeprecationWarning",
    "WarningCache",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
