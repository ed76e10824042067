"""EarlyStopping: end a fit when a metric no longer gets better."""

from __future__ import annotations

import logging
import math
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from trainyard.callbacks.base import Callback
from trainyard.callbacks.checkpoint_records import as_tensor
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


class EarlyStoppingReason(Enum):
    """Lightning's values."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """`lightning.pytorch.callbacks.EarlyStopping`.

    All ranks decide on rank 0's value, and a value that is not finite on any rank stops all. A run that had decided to
    stop does not go on when it is restarted. Raises MisconfigurationException for a mode that is neither "min" nor "max",
    RuntimeError if nobody has logged `monitor` (`strict`).
    """

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, monitor: str, min_delta: float = 0.0, patience: int = 3, verbose: bool = False, mode: str = "min",
        strict: bool = True, check_finite: bool = True, stopping_threshold: float | None = None,
        divergence_threshold: float | None = None, check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"EarlyStopping(mode={mode!r}): is neither 'min' nor 'max'")
        self.monitor, self.mode = monitor, mode
        self.min_delta = abs(min_delta)
        self.patience, self.verbose, self.strict = patience, verbose, strict
        self.check_finite = check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self._given_check_on_train_epoch_end = check_on_train_epoch_end
        self._check_on_train_epoch_end = bool(check_on_train_epoch_end)
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self.best_score = torch.tensor(math.inf if mode == "min" else -math.inf)
        self._looked_at: int | None = None
        """Batches since the start of the run at the newest look. What is done again after a resume counts once."""
        self._goes_on = False

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    # ---- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """By default at the epoch's end where every epoch has one validation there, else when a validation ends."""
        if self._given_check_on_train_epoch_end is None:
            schedule = trainer.schedule
            self._check_on_train_epoch_end = (
                schedule.val_check_interval == 1.0 and schedule.check_val_every_n_epoch == 1
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._goes_on and self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
        self._goes_on = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._check_on_train_epoch_end:
            self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._check_on_train_epoch_end:
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        """Collective."""
        moment = trainer.loop_state.total_batches
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        if self._looked_at == moment:
            return
        values = self._values(trainer)
        if values is None:
            return
        self._looked_at = moment
        current = values[0]
        if self.check_finite and not all(math.isfinite(value) for value in values):
            current = next(value for value in values if not math.isfinite(value))
        reason, message = self.judge(current)
        if reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason, self.stopping_reason_message = reason, message
        if message and self.verbose and (trainer.is_global_zero or not self.log_rank_zero_only):
            _log.info("rank %d: %s", trainer.global_rank, message)

    def _values(self, trainer: Trainer) -> list[float] | None:
        """By rank. None if rank 0 has none and that is no error."""
        metrics = trainer.callback_metrics
        mine = float(metrics[self.monitor]) if self.monitor in metrics else None
        said: list[float | None] = trainer.strategy.peers.gather(mine)
        if said[0] is not None:
            return [value for value in said if value is not None]
        text = (
            f"EarlyStopping(monitor={self.monitor!r}): nothing was logged under that name; "
            f"there is: {', '.join(sorted(metrics)) or 'nothing'}"
        )
        if self.strict:
            raise RuntimeError(text)
        _log.warning("%s", text)
        return None

    # ---- what

    def judge(self, current: float) -> tuple[EarlyStoppingReason, str | None]:
        """Take note of one more value: whether to stop for it, and what to say."""
        best = float(self.best_score)
        if self.check_finite and not math.isfinite(current):
            return EarlyStoppingReason.NON_FINITE_METRIC, (
                f"{self.monitor} = {current} is not finite; its best was {best:.3f}"
            )
        if self.stopping_threshold is not None and self._better(current, self.stopping_threshold):
            return EarlyStoppingReason.STOPPING_THRESHOLD, (
                f"{self.monitor} = {current:.3f} has reached stopping_threshold = {self.stopping_threshold}"
            )
        if self.divergence_threshold is not None and self._better(self.divergence_threshold, current):
            return EarlyStoppingReason.DIVERGENCE_THRESHOLD, (
                f"{self.monitor} = {current:.3f} has passed divergence_threshold = {self.divergence_threshold}"
            )
        margin = self.min_delta if self.mode == "min" else -self.min_delta
        if self._better(current + margin, best):
            message = f"{self.monitor} got better: {best:.3f} to {current:.3f}"
            self.best_score, self.wait_count = as_tensor(current), 0
            return EarlyStoppingReason.NOT_STOPPED, message
        self.wait_count += 1
        if self.wait_count < self.patience:
            return EarlyStoppingReason.NOT_STOPPED, None
        return EarlyStoppingReason.PATIENCE_EXHAUSTED, (
            f"{self.monitor} did not get better {self.wait_count} times in a row; its best was {best:.3f}"
        )

    def _better(self, one: float, other: float) -> bool:
        return one < other if self.mode == "min" else one > other

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Lightning's keys, and ours under one."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "trainyard": {
                "looked_at": self._looked_at, "reason": self.stopping_reason.value,
                "message": self.stopping_reason_message,
            },
        }  # fmt: skip

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Who asks for more of a file by fit(ckpt_path=...) gets more; who is restarted gets what was decided.
        self._goes_on = trainer.state.fn == "fit" and trainer.ckpt_path is None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = torch.as_tensor(state_dict["best_score"]).cpu()
        self.patience = state_dict["patience"]
        ours = state_dict.get("trainyard")
        if ours is not None:
            self._looked_at = ours["looked_at"]
            self.stopping_reason = EarlyStoppingReason(ours["reason"])
            self.stopping_reason_message = ours["message"]
