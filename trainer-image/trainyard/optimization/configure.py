"""What `configure_optimizers` may return, and when schedulers step."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException
from trainyard.optimization.nothing import NoOptimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainyard.core.module import LightningModule

_log = logging.getLogger("trainyard")

_FORMS = (
    "an optimizer, a list of them, ([optimizers], [schedulers]), {'optimizer': ..., 'lr_scheduler': scheduler or dict}, "
    "a list of such dicts, or None"
)


@dataclass(slots=True, kw_only=True)
class SchedulerConfig:
    """Lightning's `lr_scheduler` dict."""

    scheduler: Any
    interval: str = "epoch"
    """"epoch" or "step" (optimizer steps)."""
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool = False


def configure(module: LightningModule) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    """Of `module.configure_optimizers()`. Raises MisconfigurationException for what it does not understand."""
    from torch.optim import Optimizer

    returned = module.configure_optimizers()
    optimizers, schedulers = _split(returned)
    if returned is None and module.automatic_optimization:
        _log.warning(
            "configure_optimizers returned None: this fit runs without an optimizer, and learns nothing"
        )
        return [NoOptimizer()], []
    wrong = [type(o).__name__ for o in optimizers if not isinstance(o, Optimizer)]
    if wrong:
        raise MisconfigurationException(
            f"configure_optimizers: a {wrong[0]} is no Optimizer. It may return {_FORMS}"
        )
    if module.automatic_optimization and len(optimizers) != 1:
        found = ", ".join(type(o).__name__ for o in optimizers) or "none"
        raise MisconfigurationException(
            f"configure_optimizers must give one optimizer; it gave {found}. For several, or none, set "
            f"self.automatic_optimization = False in __init__ and step them in training_step. It may return {_FORMS}"
        )
    configs = [_scheduler(s) for s in schedulers]
    for config in configs:
        config.name = config.name or None
        own = getattr(config.scheduler, "optimizer", None)
        if own is not None and not any(own is o for o in optimizers):
            raise MisconfigurationException(
                f"lr_scheduler: a {type(config.scheduler).__name__} was made for another optimizer than those returned"
            )
    return optimizers, configs


def _split(returned: Any) -> tuple[list[Any], list[Any]]:
    from torch.optim import Optimizer

    if isinstance(returned, Optimizer):
        return [returned], []
    if isinstance(returned, dict):
        unknown = set(returned) - {"optimizer", "lr_scheduler", "monitor"}
        if "optimizer" not in returned or unknown:
            raise MisconfigurationException(
                f"configure_optimizers: keys {sorted(returned)}; it may return {_FORMS}"
            )
        scheduler = returned.get("lr_scheduler")
        if scheduler is not None and not isinstance(scheduler, dict) and "monitor" in returned:
            scheduler = {"scheduler": scheduler, "monitor": returned["monitor"]}
        return [returned["optimizer"]], [] if scheduler is None else [scheduler]
    if isinstance(returned, list | tuple):
        if len(returned) == 2 and isinstance(returned[0], list | tuple):
            second = returned[1] if isinstance(returned[1], list | tuple) else [returned[1]]
            return list(returned[0]), list(second)
        if returned and all(isinstance(part, dict) for part in returned):
            pairs = [_split(part) for part in returned]
            return [o for found, _ in pairs for o in found], [s for _, found in pairs for s in found]
        return list(returned), []
    return [] if returned is None else [returned], []


def _scheduler(given: Any) -> SchedulerConfig:
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    if isinstance(given, dict):
        known = [f.name for f in fields(SchedulerConfig)]
        unknown = sorted(set(given) - set(known))
        if unknown or "scheduler" not in given:
            raise MisconfigurationException(
                f"lr_scheduler: keys {sorted(given)}; it takes {', '.join(known)}"
            )
        config = SchedulerConfig(**given)
    else:
        config = SchedulerConfig(scheduler=given)
    if config.interval not in ("step", "epoch"):
        raise MisconfigurationException(
            f"lr_scheduler.interval: {config.interval!r} is neither 'step' nor 'epoch'"
        )
    if not isinstance(config.frequency, int) or config.frequency < 1:
        raise MisconfigurationException(
            f"lr_scheduler.frequency: {config.frequency!r} is not a positive integer"
        )
    config.reduce_on_plateau |= isinstance(config.scheduler, ReduceLROnPlateau)
    if config.reduce_on_plateau and not config.monitor:
        raise MisconfigurationException(
            "ReduceLROnPlateau needs {'scheduler': ..., 'monitor': <a logged name>}"
        )
    return config
