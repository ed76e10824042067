"""The interface of a logger, and how it finds back to its run when training is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainyard.callbacks.model_checkpoint import ModelCheckpoint


class Logger:
    """`lightning.pytorch.loggers.Logger`, and what a resume needs: `state_dict`, `load_state_dict`, `resume`.

    Constructors contact nobody and start nothing; `experiment` is made on its first use, on rank 0. A method that
    raises makes the trainer leave this logger out; it never stops training.
    """

    LOGGER_JOIN_CHAR = "-"
    """Between `prefix` and the metric's name."""

    @property
    def name(self) -> str | None:
        """Of the experiment: by it runs are put together."""
        return None

    @property
    def version(self) -> int | str | None:
        """Of the run within the experiment."""
        return None

    @property
    def experiment(self) -> Any:
        """The vendor's own object."""
        return None

    @property
    def root_dir(self) -> str | None:
        """Of all versions; None without files."""
        return None

    @property
    def log_dir(self) -> str | None:
        """Of this version: where ModelCheckpoint puts its files, too; None without files."""
        return None

    @property
    def save_dir(self) -> str | None:
        """What the constructor was told."""
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
        """The end of a fit, test...: "success", "failed" or "interrupted". Flushes; after a failure it also ends what
        the vendor's SDK runs in the background, within seconds. The logger can be used again."""

    def close(self) -> None:
        """Ours: flush, and end threads, processes and servers. The next use opens the same run again."""

    # ---- resume

    def state_dict(self) -> dict[str, Any]:
        """Ours: which run this is (JSON), for checkpoints and for the other ranks. What is held back is written out,
        so that a process that is killed after the checkpoint has lost nothing of what came before it."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Ours: go on with that run, unless the constructor was told another one. Before the first use."""

    def resume(self, step: int) -> None:
        """Ours: training begins after `step` optimizer steps. What the run already has of steps >= `step` comes again
        and is dropped, here or there."""
