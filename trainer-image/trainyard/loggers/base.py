"""The interface of a logger. Only rank 0 calls it, and a logger that fails is left out, not fatal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Logger:
    """`lightning.pytorch.loggers.Logger`."""

    @property
    def name(self) -> str | None:
        return None

    @property
    def version(self) -> int | str | None:
        return None

    @property
    def save_dir(self) -> str | None:
        return None

    @property
    def log_dir(self) -> str | None:
        return None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """`step` counts from 0, as Lightning's does."""

    def log_hyperparams(self, params: Mapping[str, Any]) -> None: ...

    def save(self) -> None:
        """Write out what is held back."""

    def finalize(self, status: str) -> None:
        """ "success" or "failed": nothing comes after."""
