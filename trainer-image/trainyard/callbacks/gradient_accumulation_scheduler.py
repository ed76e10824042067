"""GradientAccumulationScheduler: another number of batches for an optimizer step from certain epochs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.callbacks.base import Callback
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """`lightning.pytorch.callbacks.GradientAccumulationScheduler`: `{0: 8, 4: 4}` is 8 batches a step, and 4 from the
    epoch with index 4 on.

    Raises TypeError if `scheduling` is empty, MisconfigurationException for an epoch below 0 or a factor below 1.
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        if not scheduling:
            raise TypeError("GradientAccumulationScheduler(scheduling={}): give {epoch: batches for a step}")
        for epoch, factor in scheduling.items():
            if not isinstance(epoch, int) or epoch < 0:
                raise MisconfigurationException(
                    f"GradientAccumulationScheduler: {epoch!r} is no epoch; they count from 0"
                )
            if not isinstance(factor, int) or factor < 1:
                raise MisconfigurationException(
                    f"GradientAccumulationScheduler: {factor!r} batches for a step; at least 1"
                )
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any epoch does."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Batches for a step in `epoch`, which counts from 0."""
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises MisconfigurationException where somebody else decides."""
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "GradientAccumulationScheduler: with manual optimization, training_step decides when to step"
            )
        if trainer.accumulate_grad_batches not in (1, *self.scheduling.values()):
            raise MisconfigurationException(
                f"GradientAccumulationScheduler: leave out Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
