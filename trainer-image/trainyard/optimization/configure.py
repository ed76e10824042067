"""What `configure_optimizers` may return, and when schedulers step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from torch.optim import Optimizer

_FORMS = "an optimizer, a list of one, ([optimizer], [scheduler]), or {'optimizer': ..., 'lr_scheduler': scheduler or dict}"


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


def configure(returned: Any) -> tuple[Optimizer, list[SchedulerConfig]]:
    """Raises MisconfigurationException for what it does not understand."""
    from torch.optim import Optimizer

    optimizers, schedulers = _split(returned)
    if len(optimizers) != 1 or not isinstance(optimizers[0], Optimizer):
        found = ", ".join(type(o).__name__ for o in optimizers) or "none"
        raise MisconfigurationException(
            f"configure_optimizers must give one optimizer (several need manual optimisation, which this version does not "
            f"have); it gave {found}. It may return {_FORMS}"
        )
    return optimizers[0], [_scheduler(s) for s in schedulers]


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
        if len(returned) == 2 and all(isinstance(part, list | tuple) for part in returned):
            return list(returned[0]), list(returned[1])
        if len(returned) == 1 and isinstance(returned[0], dict):
            return _split(returned[0])
        return list(returned), []
    return [returned], []


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
