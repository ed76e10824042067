"""What the device is doing, in the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.errors import MisconfigurationException
from trainyard.utilities.cpu_stats import CPUStats

if TYPE_CHECKING:
    import torch

    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer


class DeviceStatsMonitor(Callback):
    """`lightning.pytorch.callbacks.DeviceStatsMonitor`: before and after the batches at which the loggers are written.

    The statistics of the device's allocator (`torch.accelerator.memory_stats`; bytes and counts), and on a CPU, or with
    `cpu_stats=True`, how busy CPU, memory and swap are, in percent. Keys are
    `DeviceStatsMonitor.on_train_batch_end/<statistic>`. Nothing waits for the device. Raises MisconfigurationException
    without a logger.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        self._cpu_stats = cpu_stats
        self._cpu: CPUStats | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.loggers and not trainer.fast_dev_run:
            raise MisconfigurationException(
                "DeviceStatsMonitor has nowhere to write to with Trainer(logger=False)"
            )
        on_cpu = trainer.strategy.device.type == "cpu"
        if self._cpu_stats or (self._cpu_stats is None and on_cpu):
            self._cpu = CPUStats()
            self._cpu.read()  # the next one is about this training

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.loop_state.stepped + 1) % trainer.log_every_n_steps == 0:
            self._log(trainer, "on_train_batch_start", trainer.loop_state.stepped)

    def on_logs_flushed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, "on_train_batch_end", trainer.loop_state.stepped - 1)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluated(trainer, "on_validation_batch_start", batch_idx)

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluated(trainer, "on_validation_batch_end", batch_idx)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluated(trainer, "on_test_batch_start", batch_idx)

    def on_test_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluated(trainer, "on_test_batch_end", batch_idx)

    def _evaluated(self, trainer: Trainer, key: str, batch_idx: int) -> None:
        if not trainer.sanity_checking and (batch_idx + 1) % trainer.log_every_n_steps == 0:
            self._log(trainer, key, trainer.loop_state.stepped)

    def _log(self, trainer: Trainer, key: str, step: int) -> None:
        if not trainer.is_global_zero:
            return
        stats = memory_stats(trainer.strategy.device)
        if self._cpu is not None:
            stats.update(self._cpu.read())
        trainer.metrics.each_logger(
            lambda logger: logger.log_metrics(
                {f"DeviceStatsMonitor.{key}{logger.group_separator}{name}": v for name, v in stats.items()},
                step,
            )
        )


def memory_stats(device: torch.device) -> dict[str, float]:
    """Of the caching allocator; empty for a CPU."""
    import torch

    if device.type == "cpu":
        return {}
    if device.type == "cuda":
        return dict(torch.cuda.memory_stats(device))
    return dict(torch.accelerator.memory_stats(device))
