"""StochasticWeightAveraging: end with the average over the ends of the last epochs, trained at a constant high rate.

Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018, arXiv:1803.05407.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR

from trainyard.callbacks.average import Average
from trainyard.callbacks.base import Callback
from trainyard.callbacks.weight_averaging import refuse_sharded
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


class StochasticWeightAveraging(Callback):
    """`lightning.pytorch.callbacks.StochasticWeightAveraging`.

    From the epoch `swa_epoch_start` on (counting from 1, or a share of max_epochs) the learning rates go to `swa_lrs` within
    `annealing_epochs`, and the weights at the end of each epoch go into the average, which the module has when training
    has ended. Batch normalisation then gets its statistics from one pass over the training data, without a step. Raises
    MisconfigurationException for arguments out of range, several optimizers or schedulers, manual optimization, and
    where parameters are spread over processes.
    """

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, swa_lrs: float | list[float], swa_epoch_start: int | float = 0.8, annealing_epochs: int = 10,
        annealing_strategy: str = "cos", avg_fn: Callable[..., torch.Tensor] | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:  # fmt: skip
        _check(swa_lrs, swa_epoch_start, annealing_epochs, annealing_strategy)
        self._rates = swa_lrs
        self._given_start = swa_epoch_start
        self._annealing_epochs, self._annealing_strategy = annealing_epochs, annealing_strategy
        self._avg_fn = avg_fn
        self._device = None if device is None else torch.device(device)
        self._start = self._last = 0
        self._average: Average | None = None
        self._updated_epoch = -1
        self._restored: dict[str, Any] | None = None

    @property
    def swa_start(self) -> int:
        """The first epoch of the average, counting from 0; known from on_fit_start on."""
        return self._start

    @property
    def swa_end(self) -> int:
        """The last one."""
        return self._last

    # ---- a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_sharded(self, trainer)
            self._average, self._updated_epoch = None, -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                "StochasticWeightAveraging needs automatic optimization with one optimizer"
            )
        if len(trainer.lr_scheduler_configs) > 1:
            raise MisconfigurationException(
                "StochasticWeightAveraging takes the place of one lr_scheduler, not several"
            )
        if trainer.max_epochs == -1:
            raise MisconfigurationException(
                "StochasticWeightAveraging needs max_epochs, to know the last epochs"
            )
        start = self._given_start
        first = int(trainer.max_epochs * start) if isinstance(start, float) else start
        self._start, self._last = max(first - 1, 0), trainer.max_epochs - 1
        state, self._restored = self._restored, None
        if state is not None and state["average_model_state"] is not None:
            self._begin(trainer, pl_module)
            self._average_now.load(state["average_model_state"], int(state["n_averaged"]))
            self._updated_epoch = state["latest_update_epoch"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is None and self._start <= trainer.current_epoch <= self._last:
            self._begin(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if self._average is not None and self._updated_epoch < epoch <= self._last:
            self._average.update(pl_module)
            self._updated_epoch = epoch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is None or not self._average.count:
            return
        self._average.copy_to(pl_module)
        if trainer.is_global_zero:
            _log.info("the weights are now the average of %d epochs", self._average.count)
        normalised_anew(trainer, pl_module)

    @property
    def _average_now(self) -> Average:
        if self._average is None:
            raise RuntimeError("the average has not begun")
        return self._average

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._average = Average(module, self._device, use_buffers=False, avg_fn=self._avg_fn)
        optimizer = trainer.optimizers[0]
        scheduler = SWALR(
            optimizer, self._rates, anneal_epochs=self._annealing_epochs, anneal_strategy=self._annealing_strategy  # type: ignore[arg-type]
        )  # fmt: skip
        if trainer.is_global_zero:
            _log.info("learning rates go to %s from epoch %d on", self._rates, trainer.current_epoch)
        from trainyard.optimization.configure import SchedulerConfig

        trainer.lr_scheduler_configs = [SchedulerConfig(scheduler=scheduler, interval="epoch")]

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        average = self._average
        return {
            "n_averaged": 0 if average is None else average.count,
            "latest_update_epoch": self._updated_epoch,
            "average_model_state": None if average is None else average.state(),
            "scheduler_state": None,  # it is among the others'; Lightning asks for the key
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict


@torch.no_grad()
def normalised_anew(trainer: Trainer, module: LightningModule) -> None:
    """Collective: the statistics of batch normalisation for the weights as they are, from the training data.

    What torch.optim.swa_utils.update_bn does, with training_step in the place of forward.
    """
    from trainyard.data.transfer import Transfer
    from trainyard.logged.results import Results
    from trainyard.optimization.automatic import training_step
    from trainyard.reproducibility import isolate_rng

    norms = {
        part: part.momentum
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    }
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # all batches alike
    step, transfer, metrics = training_step(trainer, trainer.hooks), Transfer(trainer), trainer.metrics
    stage, metrics.stage = metrics.stage, Results()  # what the steps log is not of the training
    training = module.training
    module.train()
    batches = trainer.train_feed.iterate(trainer.current_epoch, 0)
    with isolate_rng(), contextlib.closing(batches):  # type: ignore[type-var]
        for index, (_, raw) in enumerate(batches):
            step(transfer(raw, 0), index)
    module.train(training)
    metrics.stage = stage
    for norm, momentum in norms.items():
        norm.momentum = momentum


def _check(rates: Any, start: Any, epochs: Any, strategy: Any) -> None:
    """Raises MisconfigurationException."""
    listed = rates if isinstance(rates, list) else [rates]
    if not listed or not all(isinstance(rate, int | float) and rate > 0 for rate in listed):
        raise MisconfigurationException(
            f"StochasticWeightAveraging(swa_lrs={rates!r}): is no positive number or list of such"
        )
    whole = isinstance(start, int) and start >= 1
    if not whole and not (isinstance(start, float) and 0.0 <= start <= 1.0):
        raise MisconfigurationException(
            f"StochasticWeightAveraging(swa_epoch_start={start!r}): is neither an integer from 1 on nor a float in [0, 1]"
        )
    if not isinstance(epochs, int) or epochs < 0:
        raise MisconfigurationException(
            f"StochasticWeightAveraging(annealing_epochs={epochs!r}): is no integer from 0 on"
        )
    if strategy not in ("cos", "linear"):
        raise MisconfigurationException(
            f"StochasticWeightAveraging(annealing_strategy={strategy!r}): is neither 'cos' nor 'linear'"
        )
