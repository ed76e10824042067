"""What modules, callbacks and scripts read from a Trainer: Lightning's property names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from trainyard.core.module import LightningModule
    from trainyard.data.loader import Feed
    from trainyard.environment import Place
    from trainyard.logged.metrics import Metrics
    from trainyard.loggers import Logger
    from trainyard.loops.schedule import Schedule
    from trainyard.loops.state import LoopState
    from trainyard.plugins.precision import Precision
    from trainyard.trainer.progress import Progress


class TrainerFacade:
    """Read-only views of what a Trainer is composed of."""

    place: Place
    schedule: Schedule
    loop_state: LoopState
    metrics: Metrics
    progress: Progress
    precision_plugin: Precision
    loggers: list[Logger]
    accumulate_grad_batches: int
    default_root_dir: Path
    _module: LightningModule | None

    @property
    def train_feed(self) -> Feed:
        raise NotImplementedError

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        return self.metrics.callback_metrics()

    @property
    def logged_metrics(self) -> dict[str, float]:
        return dict(self.metrics.logged)

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        return dict(self.metrics.bar)

    @property
    def validation_metrics(self) -> dict[str, float]:
        """Of the newest validation."""
        return dict(self.metrics.validation)

    @property
    def loss(self) -> float | None:
        return self.progress.loss

    @property
    def samples_per_second(self) -> float | None:
        return self.progress.samples_per_second

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.is_global_zero:
            print(*args, **kwargs)

    @property
    def lightning_module(self) -> LightningModule:
        """Raises RuntimeError before fit."""
        if self._module is None:
            raise RuntimeError("this Trainer has no module yet: call fit")
        return self._module

    @property
    def model(self) -> LightningModule | None:
        return self._module

    @property
    def global_step(self) -> int:
        """Optimizer steps since the start of the run."""
        return self.loop_state.step

    @property
    def current_epoch(self) -> int:
        return self.loop_state.epoch

    @property
    def global_rank(self) -> int:
        return self.place.rank

    @property
    def local_rank(self) -> int:
        return self.place.local_rank

    @property
    def node_rank(self) -> int:
        return self.place.node_rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def num_nodes(self) -> int:
        return self.place.nodes

    @property
    def num_devices(self) -> int:
        return self.place.local_world_size

    @property
    def is_global_zero(self) -> bool:
        return self.place.rank == 0

    @property
    def precision(self) -> str:
        return self.precision_plugin.name

    @property
    def logger(self) -> Logger | None:
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> str | None:
        return self.loggers[0].log_dir if self.loggers else str(self.default_root_dir)

    @property
    def num_training_batches(self) -> int | float:
        batches = self.train_feed.batches
        return float("inf") if batches is None else batches

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, None if there is no telling."""
        return self.schedule.total_steps(self.train_feed.batches, self.accumulate_grad_batches)

    @property
    def max_epochs(self) -> int:
        return self.schedule.max_epochs

    @property
    def max_steps(self) -> int:
        return self.schedule.max_steps

    @property
    def min_epochs(self) -> int:
        return self.schedule.min_epochs

    @property
    def min_steps(self) -> int:
        return self.schedule.min_steps

    @property
    def estimated_stepping_batches(self) -> int | float:
        total = self.total_steps
        return float("inf") if total is None else total
