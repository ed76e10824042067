"""The interface of a logger. Only rank 0 calls it, and a logger that fails is left out, not fatal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainyard.callbacks.model_checkpoint import ModelCheckpoint


class Logger:
    """`lightning.pytorch.loggers.Logger`."""

    @property
    def name(self) -> str | None:
        return None

    @property
    def version(self) -> int | str | None:
        return None

    @property
    def experiment(self) -> Any:
        """The vendor's own object."""
        return None

    @property
    def root_dir(self) -> str | None:
        return None

    @property
    def log_dir(self) -> str | None:
        return None

    @property
    def save_dir(self) -> str | None:
        return None

    @property
    def group_separator(self) -> str:
        """Between the parts of a metric's name that the vendor groups by."""
        return "/"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """`step` counts from 0, as Lightning's does."""

    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Once, at the start of a fit."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Of the module, for loggers that can draw it."""

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """A ModelCheckpoint has written files."""

    def save(self) -> None:
        """Write out what is held back."""

    def finalize(self, status: str) -> None:
        """ "success" or "failed": nothing comes after, until the next fit."""


def default_root(path: str | Path | None) -> str:
    """`path`, or the working directory."""
    return str(path if path is not None else Path.cwd())
