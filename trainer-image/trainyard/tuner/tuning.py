"""`Tuner`: searches before a fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.batch_size_finder import BatchSizeFinder
from trainyard.callbacks.lr_finder import LearningRateFinder
from trainyard.errors import MisconfigurationException
from trainyard.profilers import PassThroughProfiler
from trainyard.reproducibility import isolate_rng
from trainyard.tuner.rehearsal import silent_loggers

if TYPE_CHECKING:
    from trainyard.callbacks.base import Callback
    from trainyard.core.datamodule import LightningDataModule
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer
    from trainyard.tuner.lr_finder import LRFinder

_METHODS = ("fit", "validate", "test", "predict")


class Tuner:
    """`lightning.pytorch.tuner.Tuner`. A search leaves the trainer, the model's weights and all generators as they were, and
    calls no callbacks or loggers of the trainer's; what it finds is set in the model, and known to the next fit.

    Under torchrun all ranks call it, and all find the same.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def lr_find(  # noqa: PLR0917 - Lightning's signature
        self, model: LightningModule, train_dataloaders: Any = None, val_dataloaders: Any = None,
        dataloaders: Any = None, datamodule: LightningDataModule | None = None, method: str = "fit",
        min_lr: float = 1e-8, max_lr: float = 1, num_training: int = 100, mode: str = "exponential",
        early_stop_threshold: float | None = 4.0, update_attr: bool = True, attr_name: str = "",
    ) -> LRFinder | None:  # fmt: skip
        """Search for a learning rate: see `LearningRateFinder`. None if nothing was searched (fast_dev_run).

        Raises MisconfigurationException.
        """
        if method != "fit":
            raise MisconfigurationException(
                f"method: {method!r}; a learning rate can only be found for 'fit'"
            )
        finder = _FindLearningRate(
            min_lr, max_lr, num_training, mode, early_stop_threshold, update_attr, attr_name
        )
        self._run(finder, model, method, train_dataloaders, val_dataloaders, dataloaders, datamodule)
        return finder.optimal_lr

    def scale_batch_size(  # noqa: PLR0917 - Lightning's signature
        self, model: LightningModule, train_dataloaders: Any = None, val_dataloaders: Any = None,
        dataloaders: Any = None, datamodule: LightningDataModule | None = None, method: str = "fit",
        mode: str = "power", steps_per_trial: int = 3, init_val: int = 2, max_trials: int = 25,
        batch_arg_name: str = "batch_size", margin: float = 0.05, max_val: int = 8192,
    ) -> int | None:  # fmt: skip
        """Search for the largest batch size: see `BatchSizeFinder`. None if nothing was searched (fast_dev_run).

        Raises MisconfigurationException.
        """
        finder = _FindBatchSize(mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)
        self._run(finder, model, method, train_dataloaders, val_dataloaders, dataloaders, datamodule)
        return finder.optimal_batch_size

    def _run(  # noqa: PLR0917
        self, finder: Callback, model: Any, method: str, train: Any, val: Any, other: Any, datamodule: Any
    ) -> None:
        if method not in _METHODS:
            raise MisconfigurationException(f"method: {method!r} is none of {', '.join(map(repr, _METHODS))}")
        wrong = "dataloaders" if method == "fit" else "train_dataloaders and val_dataloaders"
        if (other if method == "fit" else (train, val) != (None, None) or None) is not None:
            raise MisconfigurationException(f"{wrong}: not for method={method!r}")
        trainer = self._trainer
        for kind in (LearningRateFinder, BatchSizeFinder):
            if isinstance(finder, kind) and any(isinstance(c, kind) for c in trainer.callbacks):
                raise MisconfigurationException(
                    f"callbacks: the Trainer has a {kind.__name__} already, which searches when it fits; leave it out, or "
                    "do not use the Tuner"
                )
        with _alone(trainer, finder), isolate_rng():
            if method == "fit":
                trainer.fit(model, train, val, datamodule)
            elif method == "predict":
                trainer.predict(model, other, datamodule, return_predictions=False)
            else:
                getattr(trainer, method)(model, other, verbose=False, datamodule=datamodule)


@contextmanager
def _alone(trainer: Trainer, finder: Callback) -> Iterator[None]:
    """The trainer with this callback only, no logger and no checkpoints; afterwards as it was, but for its model."""
    attributes = dict(vars(trainer))
    try:
        trainer.callbacks, trainer.loggers = [finder], silent_loggers(trainer)
        trainer._checkpoint_config, trainer.profiler = None, PassThroughProfiler()
        yield
    finally:
        attributes.update({name: vars(trainer)[name] for name in ("_module", "datamodule")})
        vars(trainer).clear()
        vars(trainer).update(attributes)


class _NoLoop:
    """In the place of the FitLoop when there is nothing to fit after the search."""

    def run(self) -> None: ...


class _FindLearningRate(LearningRateFinder):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.search(trainer, pl_module)
        trainer.fit_loop = _NoLoop()  # type: ignore[assignment]


class _FindBatchSize(BatchSizeFinder):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.search(trainer, pl_module)
        trainer.fit_loop = _NoLoop()  # type: ignore[assignment]

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.search(trainer, pl_module)
        trainer.eval_feeds.clear()  # nothing is left for the loop that is about to begin
