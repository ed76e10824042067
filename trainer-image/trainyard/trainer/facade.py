"""What modules, callbacks and scripts read from a Trainer: Lightning's property names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.optimization.manual import LightningOptimizer
from trainyard.trainer.states import RunningStage, TrainerFn, TrainerStatus

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from trainyard.accelerators import Accelerator
    from trainyard.callbacks.base import Callback
    from trainyard.core.module import LightningModule
    from trainyard.data.loader import Feed
    from trainyard.environment import Place
    from trainyard.logged.metrics import Metrics
    from trainyard.loggers.base import Logger
    from trainyard.loops.schedule import Schedule
    from trainyard.loops.state import LoopState
    from trainyard.plugins.precision import Precision
    from trainyard.strategies.base import Strategy
    from trainyard.trainer.progress import Progress
    from trainyard.trainer.states import TrainerState


class TrainerFacade:
    """Read-only views of what a Trainer is composed of."""

    place: Place
    stop: Any
    schedule: Schedule
    state: TrainerState
    strategy: Strategy
    loop_state: LoopState
    metrics: Metrics
    progress: Progress
    callbacks: list[Callback]
    loggers: list[Logger]
    optimizers: list[Optimizer]
    accumulate_grad_batches: int
    limit_train_batches: int | float | None
    limit_val_batches: int | float | None
    limit_test_batches: int | float | None
    limit_predict_batches: int | float | None
    num_sanity_val_steps: int
    default_root_dir: str
    val_feeds: list[Feed]
    eval_feeds: list[Feed]
    _module: LightningModule | None

    @property
    def train_feed(self) -> Feed:
        raise NotImplementedError

    # ---- metrics

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """The newest value of every key; before a flush those of steps are this rank's own."""
        return self.metrics.callback_metrics()

    @property
    def logged_metrics(self) -> dict[str, float]:
        """What the loggers were given last, by key: numbers of the newest flush."""
        return dict(self.metrics.logged)

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What was logged with prog_bar=True: on a CPU of the last step, else of the newest flush."""
        return self.metrics.bar_values()

    @property
    def validation_metrics(self) -> dict[str, float]:
        """Of the newest validation."""
        return dict(self.metrics.validation)

    @property
    def loss(self) -> float | None:
        """A recent one of this rank, not older than the newest flush; None before the first."""
        return self.progress.loss

    @property
    def samples_per_second(self) -> float | None:
        """Over all ranks, of the last second or so; None at first."""
        return self.progress.samples_per_second

    def print(self, *args: Any, **kwargs: Any) -> None:
        """On rank 0 only, and around a progress bar."""
        if not self.is_global_zero:
            return
        bar = self.progress_bar_callback
        if bar is not None and callable(write := getattr(bar, "print", None)):
            write(*args, **kwargs)
        else:
            print(*args, **kwargs)

    # ---- the model

    @property
    def lightning_module(self) -> LightningModule:
        """Raises RuntimeError before the first call of an entry point."""
        if self._module is None:
            raise RuntimeError("this Trainer has no module yet: call fit")
        return self._module

    @property
    def model(self) -> LightningModule | None:
        """`lightning_module`, or None before the first call of an entry point."""
        return self._module

    @property
    def lightning_optimizers(self) -> list[LightningOptimizer]:
        """What `LightningModule.optimizers()` gives."""
        return [LightningOptimizer(optimizer, self) for optimizer in self.optimizers]  # type: ignore[arg-type]

    @property
    def accelerator(self) -> Accelerator:
        return self.strategy.kind

    @property
    def precision(self) -> str:
        """Its canonical name, such as "32-true" or "bf16-mixed"."""
        return self.strategy.precision.name

    @property
    def precision_plugin(self) -> Precision:
        return self.strategy.precision

    # ---- where it is

    @property
    def global_step(self) -> int:
        """Optimizer steps since the start of the run."""
        return self.loop_state.step

    @property
    def current_epoch(self) -> int:
        """Epochs completed, and so the number of the present one, from 0."""
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
        """Processes of this node."""
        return self.place.local_world_size

    @property
    def device_ids(self) -> list[int]:
        return list(range(self.place.local_world_size))

    @property
    def is_global_zero(self) -> bool:
        return self.place.rank == 0

    # ---- what it does

    @property
    def training(self) -> bool:
        return self.state.stage is RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        return self.state.stage is RunningStage.VALIDATING

    @property
    def testing(self) -> bool:
        return self.state.stage is RunningStage.TESTING

    @property
    def predicting(self) -> bool:
        return self.state.stage is RunningStage.PREDICTING

    @property
    def sanity_checking(self) -> bool:
        return self.state.stage is RunningStage.SANITY_CHECKING

    @property
    def evaluating(self) -> bool:
        """Whether it validates (the sanity check included) or tests."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def interrupted(self) -> bool:
        """Whether the newest call of an entry point ended with an exception."""
        return self.state.status is TrainerStatus.INTERRUPTED

    @property
    def received_sigterm(self) -> bool:
        """Whether this fit was asked to stop, on any rank."""
        return bool(self.stop.requested_by)

    # ---- loggers and callbacks

    @property
    def logger(self) -> Logger | None:
        """The first one."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Logger | None) -> None:
        self.loggers = [] if logger is None else [logger]

    @property
    def log_dir(self) -> str | None:
        """Of the first logger, the same on all ranks; without a logger, default_root_dir. Collective."""
        logger = self.logger
        mine = self.default_root_dir if logger is None else logger.log_dir or logger.save_dir
        return self.strategy.peers.broadcast(mine)  # type: ignore[no-any-return]

    def _callbacks(self, module: str, kind: str) -> list[Any]:
        import importlib

        wanted = getattr(importlib.import_module(module), kind)
        return [callback for callback in self.callbacks if isinstance(callback, wanted)]

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        return self._callbacks("trainyard.callbacks.model_checkpoint", "Checkpoint")

    @property
    def checkpoint_callback(self) -> Any:
        """The first one, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        return self._callbacks("trainyard.callbacks.early_stopping", "EarlyStopping")

    @property
    def early_stopping_callback(self) -> Any:
        """The first one, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> Any:
        """The one there is, or None."""
        return next(iter(self._callbacks("trainyard.callbacks.progress", "ProgressBar")), None)

    @property
    def prediction_writer_callbacks(self) -> list[Any]:
        return self._callbacks("trainyard.callbacks.prediction_writer", "BasePredictionWriter")

    # ---- data and lengths

    @property
    def train_dataloader(self) -> Any:
        """As it was given, or as train_dataloader() returned it; None before there is one."""
        feed = self.__dict__.get("_train_feed")
        return None if feed is None else feed.given

    def _evaluated(self, fn: TrainerFn) -> list[Any]:
        feeds = (
            self.eval_feeds if self.state.fn is fn else self.val_feeds if fn is TrainerFn.VALIDATING else []
        )
        return [feed.given for feed in feeds]

    @property
    def val_dataloaders(self) -> Any:
        """One as it was given, or a list of several; None before there is one."""
        return _one_or_all(self._evaluated(TrainerFn.VALIDATING))

    @property
    def test_dataloaders(self) -> Any:
        return _one_or_all(self._evaluated(TrainerFn.TESTING))

    @property
    def predict_dataloaders(self) -> Any:
        return _one_or_all(self._evaluated(TrainerFn.PREDICTING))

    @property
    def num_training_batches(self) -> int | float:
        """Of an epoch, for this rank; inf if there is no telling."""
        batches = self.train_feed.batches
        return float("inf") if batches is None else batches

    @property
    def num_val_batches(self) -> list[int | float]:
        """By loader, for this rank; inf if there is no telling."""
        return _lengths(self.eval_feeds if self.state.fn is TrainerFn.VALIDATING else self.val_feeds)

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """By loader, for this rank."""
        most = self.num_sanity_val_steps
        return [n if most == -1 else min(n, most) for n in self.num_val_batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        """By loader, for this rank; empty outside of `test`."""
        return _lengths(self.eval_feeds if self.state.fn is TrainerFn.TESTING else [])

    @property
    def num_predict_batches(self) -> list[int | float]:
        """By loader, for this rank; empty outside of `predict`."""
        return _lengths(self.eval_feeds if self.state.fn is TrainerFn.PREDICTING else [])

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None if there is no telling. Where several optimizers step in a batch, as many
        a batch as there have been so far."""
        total, state = self._stepping_batches, self.loop_state
        if total is None or state.step == state.stepped or self.schedule.max_steps != -1:
            return total
        return total * state.step // max(1, state.stepped)

    @property
    def _stepping_batches(self) -> int | None:
        return self.schedule.total_steps(self.train_feed.steps(self.accumulate_grad_batches))

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Steps of the whole run, for schedulers; inf if there is no telling. However many optimizers: one a window."""
        total = self._stepping_batches
        return float("inf") if total is None else total

    @property
    def max_epochs(self) -> int:
        """-1: no limit."""
        return self.schedule.max_epochs

    @property
    def max_steps(self) -> int:
        """Optimizer steps; -1: no limit."""
        return self.schedule.max_steps

    @property
    def min_epochs(self) -> int:
        return self.schedule.min_epochs

    @property
    def min_steps(self) -> int:
        return self.schedule.min_steps

    @property
    def val_check_interval(self) -> Any:
        """Batches (int), or a fraction of an epoch (float)."""
        return self.schedule.val_check_interval

    @property
    def check_val_every_n_epoch(self) -> int | None:
        return self.schedule.check_val_every_n_epoch


def _lengths(feeds: list[Feed]) -> list[int | float]:
    return [float("inf") if feed.batches is None else feed.batches for feed in feeds]


def _one_or_all(loaders: list[Any]) -> Any:
    return None if not loaders else loaders[0] if len(loaders) == 1 else loaders
