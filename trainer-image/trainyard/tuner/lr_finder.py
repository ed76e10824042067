"""The learning rate range test: train with a growing learning rate, and see where the loss falls fastest.

L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017 (arXiv:1506.01186), section 3.3; the choice of
the steepest descent and the smoothed loss are fast.ai's.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.errors import MisconfigurationException
from trainyard.tuner import attributes
from trainyard.tuner.rehearsal import rehearsal
from trainyard.utilities.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")
MODES = ("linear", "exponential")
ATTRIBUTES = ["lr", "learning_rate"]
_SMOOTHING = 0.98
"""Of the moving average of the loss, corrected for its start."""


class LRFinder:
    """What a sweep has found. `results`: "lr" and the smoothed "loss", a value for each optimizer step."""

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        if mode not in MODES:
            raise MisconfigurationException(f"mode: {mode!r} is none of {', '.join(map(repr, MODES))}")
        if not 0 < lr_min < lr_max:
            raise MisconfigurationException(
                f"min_lr={lr_min}, max_lr={lr_max}: 0 < min_lr < max_lr is not so"
            )
        if num_training < 2:
            raise MisconfigurationException(f"num_training: {num_training} is less than 2")
        self.mode, self.lr_min, self.lr_max, self.num_training = mode, lr_min, lr_max, num_training
        self.results: dict[str, list[float]] = {"lr": [], "loss": []}
        self._optimal_idx: int | None = None

    def lr_at(self, step: int) -> float:
        """`lr_min` at step 0, `lr_max` at the last."""
        share = step / (self.num_training - 1)
        if self.mode == "exponential":
            return float(self.lr_min * (self.lr_max / self.lr_min) ** share)
        return self.lr_min + share * (self.lr_max - self.lr_min)

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """Where the loss falls fastest per step, leaving out so many steps at the ends; None if there are too few."""
        import numpy as np

        losses = np.array(self.results["loss"], dtype=float)
        index = np.arange(len(losses))[skip_begin : len(losses) - skip_end]
        index = index[np.isfinite(losses[index])]
        if len(index) < 2:
            _log.warning(
                "no learning rate can be suggested from %d steps, of which %d at the start and %d at the end do not count: "
                "train for more (num_training), or raise early_stop_threshold", len(losses), skip_begin, skip_end,
            )  # fmt: skip
            self._optimal_idx = None
            return None
        lrs = np.array(self.results["lr"])[index]
        slopes = np.gradient(losses[index], np.log10(lrs) if self.mode == "exponential" else lrs)
        self._optimal_idx = int(index[int(slopes.argmin())])
        return self.results["lr"][self._optimal_idx]

    def plot(
        self, suggest: bool = False, show: bool = False, ax: Axes | None = None
    ) -> Figure | SubFigure | None:
        """Loss over learning rate; `suggest` marks the suggestion. `figure.savefig(path)` makes a picture of it.

        Raises ModuleNotFoundError without matplotlib.
        """
        require("matplotlib", "plot", "LRFinder.plot")
        from matplotlib.figure import Figure

        figure: Figure | SubFigure | None
        if ax is not None:
            figure = ax.figure
        elif show:
            from matplotlib import pyplot

            figure, ax = pyplot.subplots()
        else:  # without pyplot, which would keep the figure and may want a display
            figure = Figure()
            ax = figure.subplots()
        ax.plot(self.results["lr"], self.results["loss"])
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Loss")
        if suggest and self.suggestion() is not None and self._optimal_idx is not None:
            lr, loss = (self.results[key][self._optimal_idx] for key in ("lr", "loss"))
            ax.plot(lr, loss, "o", color="red", label=f"suggestion: {lr:.3g}")
            ax.legend()
        if show:
            from matplotlib import pyplot

            pyplot.show()
        return figure


_LRFinder = LRFinder


class Sweep(Callback):
    """Sets the learning rate of each step and takes down the loss that it led to. All ranks go the same way."""

    def __init__(self, finder: LRFinder, threshold: float | None, stop: Any) -> None:
        self._finder, self._threshold, self._stop = finder, threshold, stop
        self.abandoned = False
        """Somebody asked for the end of the run."""
        self._losses: list[Any] = []
        self._average = 0.0
        self._best = math.inf

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._set(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, dict) and outputs.get("loss") is not None:
            self._losses.append(outputs["loss"].double())
        step = trainer.global_step
        if step == len(self._finder.results["lr"]):
            return  # more batches of this step are to come
        self._take_down(trainer, step)
        if step < self._finder.num_training:
            self._set(trainer, step)

    def _take_down(self, trainer: Trainer, step: int) -> None:
        import torch

        nothing = torch.tensor(math.nan, dtype=torch.float64, device=trainer.strategy.device)
        loss = torch.stack(self._losses).mean() if self._losses else nothing
        self._losses.clear()
        asked = torch.tensor(float(self._stop.armed), dtype=torch.float64, device=loss.device)
        value, stop = trainer.strategy.reduce_values(torch.stack([loss, asked]), "mean").tolist()
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * value
        smooth = self._average / (1 - _SMOOTHING**step)
        results = self._finder.results
        results["lr"].append(trainer.optimizers[0].param_groups[0]["lr"])
        results["loss"].append(smooth)
        diverged = self._threshold is not None and (
            not math.isfinite(smooth) or (step > 1 and smooth > self._threshold * self._best)
        )
        if step == 1 or smooth < self._best:
            self._best = smooth
        self.abandoned = stop > 0
        trainer.should_stop = diverged or self.abandoned

    def _set(self, trainer: Trainer, step: int) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self._finder.lr_at(step)


def check_attribute(trainer: Trainer, model: LightningModule, attr_name: str) -> str:
    """Where the result goes. Raises MisconfigurationException."""
    return attributes.pick([model, trainer.datamodule], [attr_name] if attr_name else ATTRIBUTES)


def sweep(trainer: Trainer, finder: LRFinder, early_stop_threshold: float | None) -> bool:
    """Fill `finder.results`; nothing else changes. To be called at the start of a fit, on all ranks.

    False if it was broken off by a wish to stop. Raises MisconfigurationException for what cannot be swept.
    """
    if not trainer.lightning_module.automatic_optimization or len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            "lr_find works with one optimizer and automatic optimization; set the learning rates of several yourself"
        )
    if trainer.strategy.has_engine:
        raise MisconfigurationException(
            f"lr_find cannot take back what the engine of strategy {trainer.strategy.name!r} has trained; find the learning "
            "rate with another strategy first"
        )
    from trainyard.loops.fit import FitLoop

    search = Sweep(finder, early_stop_threshold, trainer.stop)
    with rehearsal(trainer, [search], finder.num_training):
        trainer.fit_loop = FitLoop(trainer, None)
        trainer.fit_loop.run()
    return not search.abandoned


def reconfigure_optimizers(trainer: Trainer) -> None:
    """At the start of a fit, once a hyperparameter has changed: as if configure_optimizers had known it."""
    from trainyard.optimization.configure import configure
    from trainyard.reproducibility import isolate_rng
    from trainyard.strategies.base import Strategy

    strategy, module = trainer.strategy, trainer.lightning_module
    with isolate_rng():  # the first call has drawn already
        optimizers, configs = configure(module)
    if type(strategy).setup_optimizers is Strategy.setup_optimizers:
        trainer.optimizers, trainer.lr_scheduler_configs = optimizers, configs
        return
    for old, new in zip(trainer.optimizers, optimizers, strict=True):
        for group, fresh in zip(old.param_groups, new.param_groups, strict=True):
            group.update({key: value for key, value in fresh.items() if key != "params"})
    for config, fresh_config in zip(trainer.lr_scheduler_configs, configs, strict=True):
        config.scheduler.load_state_dict(fresh_config.scheduler.state_dict())
