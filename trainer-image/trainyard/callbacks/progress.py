"""Progress for people: one line per flush of the logs, on rank 0. It reads well in `kubectl logs` and in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.callbacks.base import Callback

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer


class ProgressPrinter(Callback):
    """`epoch 1 step 150/450 loss=0.31 samples/s=5210`, with everything logged with prog_bar=True."""

    def __init__(self) -> None:
        self._printed: int | None = None

    def on_logs_flushed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or self._printed == trainer.global_step:
            return
        self._printed = trainer.global_step
        total = trainer.total_steps
        step = f"{trainer.global_step}/{total}" if total else f"{trainer.global_step}"
        values = {k: f"{v:.4g}" for k, v in trainer.progress_bar_metrics.items()}
        if "loss" not in values and trainer.loss is not None:
            values = {"loss": f"{trainer.loss:.4g}", **values}
        if trainer.samples_per_second:
            values["samples/s"] = f"{trainer.samples_per_second:.0f}"
        text = " ".join(f"{k}={v}" for k, v in values.items())
        print(f"epoch {trainer.current_epoch} step {step} {text}".rstrip(), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        text = " ".join(f"{k}={v:.4g}" for k, v in sorted(trainer.validation_metrics.items()))
        print(
            f"epoch {trainer.current_epoch} step {trainer.global_step} validation {text}".rstrip(), flush=True
        )
