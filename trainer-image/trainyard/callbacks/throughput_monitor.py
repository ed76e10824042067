"""How much is done in a second, in the loggers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.utilities.throughput import Throughput, get_available_flops

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer


@dataclass(slots=True)
class _Count:
    """Of one stage, since it began."""

    throughput: Throughput
    began: float = 0.0
    batches: int = 0
    samples: int = 0
    lengths: int = 0
    computed: int = 0
    """Batches at the last look at the clock."""


class ThroughputMonitor(Callback):
    """`lightning.pytorch.callbacks.ThroughputMonitor`: `train/time`, `train/batches`, `train/samples`, `train/lengths`;
    `train/device/batches_per_sec`, `samples_per_sec`, `items_per_sec`, `flops_per_sec`, `mfu`, and those of all devices
    without `device/`; likewise for validate, test and predict.

    `batch_size_fn(batch)`: samples in it; `length_fn(batch)`: items in it (tokens, say). Operations are there if the
    module has `flops_per_batch`, as a number or as a method. `kwargs` go to `Throughput`: `window_size` (batches),
    `available_flops`, `separator`. A batch costs two additions: the clock is looked at when the numbers of the loggers
    have come from the device, so that no batch waits for it. The time of validations does not count as training.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int],
        length_fn: Callable[[Any], int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **kwargs: Any,
    ) -> None:
        self.batch_size_fn, self.length_fn, self.kwargs = batch_size_fn, length_fn, kwargs
        Throughput(**kwargs)  # says now what is wrong
        self._clock = clock
        self._counts: dict[str, _Count] = {}
        self._available: float | None = None
        self._paused = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        import torch

        device = trainer.strategy.device
        self._available = None
        if device.type == "cuda":
            tf32 = torch.get_float32_matmul_precision() != "highest"
            self._available = get_available_flops(
                torch.cuda.get_device_name(device), trainer.precision, tf32=tf32
            )

    # ---- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, "train")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._count("train", batch)
        if self._counts["train"].batches == 1:
            self._look(pl_module, "train")  # what the first batch warms up is not counted into the rates

    def on_logs_flushed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "train", trainer.loop_state.stepped - 1)

    # ---- evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = self._clock()
        if not trainer.sanity_checking:
            self._begin(trainer, "validate")

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._evaluated(trainer, pl_module, "validate", batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "train" in self._counts and trainer.state.fn == "fit":
            self._counts["train"].began += self._clock() - self._paused

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, "test")

    def on_test_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluated(trainer, pl_module, "test", batch)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, "predict")

    def on_predict_batch_end(  # noqa: PLR0917 - Lightning's signature
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluated(trainer, pl_module, "predict", batch)

    # ---- counting

    def _begin(self, trainer: Trainer, stage: str) -> None:
        arguments = {"available_flops": self._available, "world_size": trainer.world_size} | self.kwargs
        self._counts[stage] = _Count(Throughput(**arguments), began=self._clock())

    def _count(self, stage: str, batch: Any) -> None:
        count = self._counts[stage]
        count.batches += 1
        count.samples += self.batch_size_fn(batch)
        if self.length_fn is not None:
            count.lengths += self.length_fn(batch)

    def _evaluated(self, trainer: Trainer, module: LightningModule, stage: str, batch: Any) -> None:
        self._count(stage, batch)
        batches = self._counts[stage].batches
        if batches == 1:
            self._look(module, stage)
        elif batches % trainer.log_every_n_steps == 0:
            self._log(trainer, module, stage, batches - 1)

    def _look(self, module: LightningModule, stage: str) -> None:
        """At the clock."""
        count = self._counts[stage]
        flops: Any = getattr(module, "flops_per_batch", None)
        flops = flops() if callable(flops) else flops
        count.throughput.update(
            time=self._clock() - count.began, batches=count.batches, samples=count.samples,
            lengths=None if self.length_fn is None else count.lengths,
            flops=None if flops is None else flops * (count.batches - count.computed),
        )  # fmt: skip
        count.computed = count.batches

    def _log(self, trainer: Trainer, module: LightningModule, stage: str, step: int) -> None:
        count = self._counts[stage]
        if count.batches > count.computed:
            self._look(module, stage)
        separator = count.throughput.separator
        found = {f"{stage}{separator}{name}": value for name, value in count.throughput.compute().items()}
        found["epoch"] = trainer.current_epoch
        trainer.metrics.each_logger(lambda logger: logger.log_metrics(found, step))
