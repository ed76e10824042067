"""Optimizer and scheduler of a configuration, in the place of the module's configure_optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainyard.cli.build import arguments_of, build, class_of
from trainyard.cli.errors import CliError
from trainyard.cli.parser import Section
from trainyard.utilities.convert import ConversionError, convert
from trainyard.utilities.hints import parameters_of


@dataclass
class Maker:
    """Makes an object of `cls` around what is only known later."""

    cls: Any
    arguments: dict[str, Any]
    extra: dict[str, Any]

    def __call__(self, around: Any) -> Any:
        return self.cls(around, **self.arguments)


@dataclass
class ConfigureOptimizers:
    """Put into the module under that name."""

    model: Any
    optimizer: Maker
    scheduler: Maker | None
    combine: Callable[[Any, Any, Any], Any]

    def __call__(self) -> Any:
        optimizer = self.optimizer([p for p in self.model.parameters() if p.requires_grad])
        if self.scheduler is None:
            return self.combine(self.model, optimizer, None)
        scheduler = self.scheduler(optimizer)
        if not self.scheduler.extra:
            return self.combine(self.model, optimizer, scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.scheduler.extra}}


def maker(section: Section, value: Any) -> Maker | None:
    """None if the section is empty. Raises CliError."""
    if value is None:
        return None
    try:
        if section.subclasses:
            cls, given = class_of(value, section.cls, section.key)
        else:
            cls, given = section.cls, dict(value)
    except ConversionError as error:
        raise CliError(f"{error.place}: {error.problem}") from None
    own = {p.name for p in parameters_of(cls)}
    extra = {k: given.pop(k) for k in section.extra if k in given and k not in own}
    arguments = arguments_of(cls, given, section.key, make=build, fixed=section.fixed)
    return Maker(cls, arguments, _converted(extra, section.key))


def _converted(extra: Mapping[str, Any], place: str) -> dict[str, Any]:
    from trainyard.optimization.configure import SchedulerConfig

    hints = {p.name: p.hint for p in parameters_of(SchedulerConfig)}
    try:
        return {k: convert(v, hints[k], f"{place}.{k}") for k, v in extra.items()}
    except ConversionError as error:
        raise CliError(f"{error.place}: {error.problem}") from None


def combine(model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
    """Lightning's: what configure_optimizers returns for them."""
    if lr_scheduler is None:
        return optimizer
    return [optimizer], [lr_scheduler]
