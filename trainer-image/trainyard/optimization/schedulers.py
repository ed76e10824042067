"""When learning rate schedulers step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer


def step_schedulers(trainer: Trainer, interval: str, *, plateau: bool) -> None:
    """`plateau`: those that want a metric, which there is after validation only. Not with manual optimization.

    Raises MisconfigurationException when the metric of a strict one was not logged.
    """
    if not trainer.lr_scheduler_configs or not trainer.lightning_module.automatic_optimization:
        return
    count = trainer.loop_state.step if interval == "step" else trainer.loop_state.epoch + 1
    for config in trainer.lr_scheduler_configs:
        if config.interval != interval or config.reduce_on_plateau != plateau or count % config.frequency:
            continue
        metric = None
        if config.reduce_on_plateau:
            metric = trainer.callback_metrics.get(str(config.monitor))
            if metric is None:
                if config.strict:
                    known = ", ".join(sorted(trainer.callback_metrics)) or "none"
                    raise MisconfigurationException(
                        f"lr_scheduler: nothing was logged as {config.monitor!r}; there is: {known}"
                    )
                continue
        metrics = trainer.metrics
        before, metrics.hook = metrics.hook, "lr_scheduler_step"
        trainer.lightning_module.lr_scheduler_step(config.scheduler, metric)
        metrics.hook = before
