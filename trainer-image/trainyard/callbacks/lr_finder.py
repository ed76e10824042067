"""The learning rate range test, at the start of a fit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer
    from trainyard.tuner.lr_finder import LRFinder

_log = logging.getLogger("trainyard")


class LearningRateFinder(Callback):
    """`lightning.pytorch.callbacks.LearningRateFinder`: `num_training_steps` optimizer steps with a learning rate that grows from
    `min_lr` to `max_lr` ("exponential" or "linear"), broken off once the smoothed loss is `early_stop_threshold` times its
    best. Then everything is taken back bit by bit, and with `update_attr` the suggestion goes into `attr_name` (or `lr`, or
    `learning_rate`) of the module or of hparams, and the optimizers are configured anew.

    A fit that resumes keeps the learning rate that it had. Override `on_fit_start` to search at other moments, between two
    steps only. Raises MisconfigurationException.
    """

    SUPPORTED_MODES = ("linear", "exponential")

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, min_lr: float = 1e-8, max_lr: float = 1, num_training_steps: int = 100, mode: str = "exponential",
        early_stop_threshold: float | None = 4.0, update_attr: bool = True, attr_name: str = "",
        weights_only: bool | None = None,
    ) -> None:  # fmt: skip
        from trainyard.tuner.lr_finder import LRFinder

        LRFinder(mode, min_lr, max_lr, num_training_steps)  # says now what is wrong
        self._min_lr, self._max_lr, self._mode = min_lr, max_lr, mode
        self._num_training_steps, self._early_stop_threshold = num_training_steps, early_stop_threshold
        self._update_attr, self._attr_name = update_attr, attr_name
        self.optimal_lr: LRFinder | None = None
        """What the newest search has found."""
        self._found: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._found is None else {"lr": self._found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._found = state_dict["lr"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.loop_state.total_batches == 0:
            self.lr_find(trainer, pl_module)
        elif self._found is not None and self._update_attr:
            self._write(trainer, pl_module, self._found)  # the optimizers have it from the checkpoint

    def lr_find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search now, and set what was found. All ranks take part."""
        from trainyard.tuner.lr_finder import reconfigure_optimizers

        if self.search(trainer, pl_module) and self._update_attr:
            reconfigure_optimizers(trainer)

    def search(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether there is a suggestion; it is in the attribute, and the optimizers do not know it yet."""
        from trainyard.tuner.lr_finder import LRFinder, check_attribute, sweep

        if trainer.fast_dev_run:
            _log.info("no learning rate is searched for in a fast_dev_run")
            return False
        if self._update_attr:
            check_attribute(trainer, pl_module, self._attr_name)  # before it takes its time
        finder = LRFinder(self._mode, self._min_lr, self._max_lr, self._num_training_steps)
        if not sweep(trainer, finder, self._early_stop_threshold):
            return False
        self.optimal_lr = finder
        found = trainer.strategy.peers.broadcast(finder.suggestion())
        if found is None:
            return False
        self._found = found
        if self._update_attr:
            self._write(trainer, pl_module, found)
            trainer.print(f"Learning rate set to {found}")
        return True

    def _write(self, trainer: Trainer, pl_module: LightningModule, lr: float) -> None:
        from trainyard.tuner import attributes
        from trainyard.tuner.lr_finder import check_attribute

        name = check_attribute(trainer, pl_module, self._attr_name)
        attributes.write([pl_module, trainer.datamodule], name, lr)
