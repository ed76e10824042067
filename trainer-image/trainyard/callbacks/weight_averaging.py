"""WeightAveraging and EMAWeightAveraging: validate with, and end with, an average over the weights of many steps."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainyard.callbacks.average import Average
from trainyard.callbacks.base import Callback
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


class WeightAveraging(Callback):
    """`lightning.pytorch.callbacks.WeightAveraging`: the equal average after every step; override `should_update`.

    `kwargs` (`avg_fn`, `multi_avg_fn`) are those of torch.optim.swa_utils.AveragedModel. The average takes the weights'
    place in validation, at the end of training, and under `state_dict` in checkpoints, which have the trained weights
    under `current_model_state`. Before the first update there is no average, and all is as without this callback.
    Raises MisconfigurationException where parameters are spread over processes.
    """

    def __init__(
        self, device: torch.device | str | None = None, use_buffers: bool = True, **kwargs: Any
    ) -> None:
        self._device = None if device is None else torch.device(device)
        self._use_buffers = use_buffers
        self._kwargs = kwargs
        self._average: Average | None = None
        self._latest_update_step = 0
        self._latest_update_epoch = -1
        self._swapped = False
        """The module has the average, and the average the module's weights."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After a step (`step_idx` counts optimizer steps from 0) or an epoch: whether to take the weights in."""
        return step_idx is not None

    # ---- a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_sharded(self, trainer)
        self._average, self._swapped = None, False
        self._latest_update_step, self._latest_update_epoch = 0, -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is None:
            self._average = self._begin(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._update(pl_module)
            self._latest_update_step = step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._update(pl_module)
            self._latest_update_epoch = epoch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is None or not self._average.count:
            return
        self._share(trainer)
        self._average.copy_to(pl_module)
        if trainer.is_global_zero:
            _log.info("the weights are now the average of %d updates", self._average.count)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._share(trainer)
            self._swap(pl_module, average=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module, average=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap(pl_module, average=False)

    # ---- the average

    def _begin(self, module: LightningModule) -> Average:
        return Average(module, self._device, use_buffers=self._use_buffers, **self._kwargs)

    def _update(self, module: LightningModule) -> None:
        if self._average is None:
            raise RuntimeError(f"{type(self).__name__}: there is nothing to update before on_fit_start")
        self._average.update(module)

    def _share(self, trainer: Trainer) -> None:
        """Before the average is used: a resumed run has rank 0's on all ranks, an unbroken one must have no other."""
        if self._average is not None and self._average.count and trainer.world_size > 1:
            self._average.share_buffers(trainer.strategy.broadcast)

    def _swap(self, module: LightningModule, *, average: bool) -> None:
        if self._average is not None and self._average.count and self._swapped != average:
            self._average.swap(module)
            self._swapped = average

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "latest_update_step": self._latest_update_step,
            "latest_update_epoch": self._latest_update_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_step = state_dict["latest_update_step"]
        self._latest_update_epoch = state_dict.get("latest_update_epoch", -1)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Collective. In Lightning's keys."""
        if self._average is None or not self._average.count:
            return
        swapped = self._swapped
        states = {}
        for average in (False, True):
            self._swap(pl_module, average=average)
            states[average] = _copy(trainer.strategy.model_state(pl_module))
        self._swap(pl_module, average=swapped)
        checkpoint["state_dict"], checkpoint["current_model_state"] = states[True], states[False]
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._average.count)}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The module has the average by now, because it is what `state_dict` holds."""
        if trainer.state.fn != "fit" or "averaging_state" not in checkpoint:
            return
        self._average = self._begin(pl_module)
        self._average.load(None, int(checkpoint["averaging_state"]["n_averaged"]))
        trainer.strategy.load_model_state(pl_module, checkpoint["current_model_state"])


class EMAWeightAveraging(WeightAveraging):
    """`lightning.pytorch.callbacks.EMAWeightAveraging`: the exponential moving average,
    `average += (1 - decay) * (weights - average)`.

    Updates after the steps with index `update_starting_at_step`, + n, + 2n... that n = `update_every_n_steps` divides, and
    after each epoch from `update_starting_at_epoch` on if that is given.
    """

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, device: torch.device | str | None = None, use_buffers: bool = True, decay: float = 0.999,
        update_every_n_steps: int = 1, update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if not 0.0 <= decay <= 1.0:
            raise MisconfigurationException(f"EMAWeightAveraging(decay={decay}): is not in [0, 1]")
        if update_every_n_steps < 0:
            raise MisconfigurationException(
                f"EMAWeightAveraging(update_every_n_steps={update_every_n_steps}): is less than 0"
            )
        if not {"avg_fn", "multi_avg_fn"} & set(kwargs):
            kwargs["multi_avg_fn"] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(device=device, use_buffers=use_buffers, **kwargs)
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is not None:
            every = self.update_every_n_steps
            return step_idx >= (self.update_starting_at_step or 0) and every > 0 and step_idx % every == 0
        start = self.update_starting_at_epoch
        return epoch_idx is not None and start is not None and epoch_idx >= start


def refuse_sharded(callback: Callback, trainer: Trainer) -> None:
    """Raises MisconfigurationException."""
    if trainer.strategy.forward_is_collective or trainer.strategy.has_engine:
        raise MisconfigurationException(
            f"{type(callback).__name__}: the strategy {trainer.strategy.name!r} spreads parameters over processes, and of "
            "such no average can be made here; use ddp"
        )


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    """On the CPU, where it is going anyway: state_dict() gives the live tensors."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }
