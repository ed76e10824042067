"""The largest batch size that the memory holds, before a loop starts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


class BatchSizeFinder(Callback):
    """`lightning.pytorch.callbacks.BatchSizeFinder`: tries batch sizes with `steps_per_trial` steps each, from `init_val` up to
    `max_val` or the size of the data, `max_trials` at most. "power" doubles; "binsearch" then narrows it down, and takes off
    `margin` of what it found. Afterwards everything but `batch_arg_name` (of the module, the data module, or the hparams of
    either) is as it was, and the loaders and, for a fit, the optimizers are made anew.

    With DDP the ranks exchange no gradients while they try, so that one may run out of memory alone; the size is what fits on
    all. A fit that resumes keeps the size that it had. Raises MisconfigurationException.
    """

    SUPPORTED_MODES = ("power", "binsearch")

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, mode: str = "power", steps_per_trial: int = 3, init_val: int = 2, max_trials: int = 25,
        batch_arg_name: str = "batch_size", margin: float = 0.05, max_val: int = 8192,
    ) -> None:  # fmt: skip
        from trainyard.tuner.batch_size_search import BatchSizeSearch

        if steps_per_trial < 1:
            raise MisconfigurationException(f"steps_per_trial: {steps_per_trial} is less than 1")
        self._search = BatchSizeSearch(
            mode=mode, init_val=init_val, max_trials=max_trials, margin=margin, max_val=max_val
        )
        self._steps_per_trial, self._batch_arg_name = steps_per_trial, batch_arg_name
        self.optimal_batch_size: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.optimal_batch_size is None else {"batch_size": self.optimal_batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimal_batch_size = state_dict["batch_size"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from trainyard.tuner.batch_size_scaling import apply

        if trainer.loop_state.total_batches == 0:
            self.scale_batch_size(trainer, pl_module)
        elif self.optimal_batch_size is not None:
            apply(trainer, self._batch_arg_name, self.optimal_batch_size)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._evaluate(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scale_batch_size(trainer, pl_module)

    def scale_batch_size(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search now, and use what was found. All ranks take part."""
        from trainyard.tuner.batch_size_scaling import apply
        from trainyard.tuner.lr_finder import reconfigure_optimizers

        if self.search(trainer, pl_module) and self.optimal_batch_size is not None:
            apply(trainer, self._batch_arg_name, self.optimal_batch_size)
            if trainer.state.fn == "fit":
                reconfigure_optimizers(trainer)  # they may have asked how many steps there will be

    def search(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether something was searched; what was found is in the attribute, and the loaders do not know it yet."""
        from trainyard.tuner import attributes
        from trainyard.tuner.batch_size_scaling import BatchSizeTrials

        if trainer.fast_dev_run:
            _log.info("no batch size is searched for in a fast_dev_run")
            return False
        trials = BatchSizeTrials(trainer, self._batch_arg_name, self._steps_per_trial)
        self.optimal_batch_size = size = trials.run(self._search)
        attributes.write([pl_module, trainer.datamodule], self._batch_arg_name, size)
        trainer.print(f"Batch size set to {size}")
        return True
