"""LearningRateMonitor: the learning rates into the loggers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainyard.callbacks.base import Callback
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer


class LearningRateMonitor(Callback):
    """`lightning.pytorch.callbacks.LearningRateMonitor`: `lr-SGD`, of a second SGD `lr-SGD-1`, of several groups
    `lr-SGD/pg1`, or what the scheduler's dict calls `name` and the group's `name`.

    Without `logging_interval`, what has a scheduler is logged at its interval. "step" means every log_every_n_steps. A
    value is logged once for a step. Raises MisconfigurationException for another interval, and without a logger.
    """

    def __init__(
        self, logging_interval: str | None = None, log_momentum: bool = False, log_weight_decay: bool = False,
        log_key_prefix: str | None = None,
    ) -> None:  # fmt: skip
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): is none of 'step', 'epoch', None"
            )
        self.logging_interval = logging_interval
        self.log_momentum, self.log_weight_decay = log_momentum, log_weight_decay
        self.log_key_prefix = log_key_prefix
        self.lrs: dict[str, list[float]] = {}
        """All values of this process, by name."""
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}
        self._logged: dict[str, int] = {}
        """By name: the step of the newest value."""

    @property
    def lr_sch_names(self) -> list[str]:
        return list(self.lrs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.loggers and not trainer.fast_dev_run:
            raise MisconfigurationException(
                "LearningRateMonitor needs a logger to give its values to, and the Trainer has none"
            )
        self.lrs = {name: [] for name, *_ in named_groups(trainer)}
        self._logged = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        due = (trainer.loop_state.stepped + 1) % trainer.log_every_n_steps == 0
        if due and self.logging_interval != "epoch":
            self._log(trainer, "step")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch")

    def _log(self, trainer: Trainer, interval: str) -> None:
        step = trainer.loop_state.stepped
        found: dict[str, float] = {}
        for name, group, own_interval in named_groups(trainer):
            mine = self.logging_interval is not None or own_interval in (None, interval)
            if not mine or self._logged.get(name) == step:
                continue
            self._logged[name] = step
            found |= self._values(name, group)
        if found:
            trainer.metrics.callback.update({name: torch.tensor(value) for name, value in found.items()})
            trainer.metrics.each_logger(lambda logger: logger.log_metrics(found, step))

    def _values(self, name: str, group: dict[str, Any]) -> dict[str, float]:
        prefix = self.log_key_prefix or ""
        rate = float(group["lr"])
        self.lrs.setdefault(name, []).append(rate)
        values = {f"{prefix}{name}": rate}
        if self.log_momentum:
            betas = group.get("betas")
            momentum = float(betas[0]) if betas is not None else float(group.get("momentum", 0.0))
            self.last_momentum_values[f"{name}-momentum"] = values[f"{prefix}{name}-momentum"] = momentum
        if self.log_weight_decay:
            decay = float(group.get("weight_decay", 0.0))
            self.last_weight_decay_values[f"{name}-weight_decay"] = decay
            values[f"{prefix}{name}-weight_decay"] = decay
        return values


def named_groups(trainer: Trainer) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """(name, parameter group, interval of its scheduler or None), those with a scheduler first (Lightning's order).

    Raises MisconfigurationException for an optimizer with two groups of one name.
    """
    seen: Counter[str] = Counter()
    for optimizer, given, interval in _optimizers(trainer):
        base = given or f"lr-{type(optimizer).__name__}"
        seen[base] += 1
        if seen[base] > 1:
            base = f"{base}-{seen[base] - 1}"
        groups = optimizer.param_groups
        names = [
            group.get("name") or (f"pg{number}" if len(groups) > 1 else None)
            for number, group in enumerate(groups, 1)
        ]
        if len(set(names)) < len(names):
            raise MisconfigurationException(
                f"{type(optimizer).__name__}: two of its parameter groups have the same name: {names}"
            )
        for name, group in zip(names, groups, strict=True):
            yield base if name is None else f"{base}/{name}", group, interval


def _optimizers(trainer: Trainer) -> Iterator[tuple[Optimizer, str | None, str | None]]:
    scheduled = set()
    for config in trainer.lr_scheduler_configs:
        optimizer = config.scheduler.optimizer
        if id(optimizer) not in scheduled:
            scheduled.add(id(optimizer))
            yield optimizer, config.name, config.interval
    for optimizer in trainer.optimizers:
        if id(optimizer) not in scheduled:
            yield optimizer, None, None
