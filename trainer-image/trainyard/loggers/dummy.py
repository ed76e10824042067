"""A logger that keeps nothing: for fast_dev_run, where a module's `self.logger.experiment.foo()` must still work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainyard.loggers.base import Logger


class DummyExperiment:
    """Takes any call, attribute and index, and does nothing; what it gives back does likewise."""

    def __getattr__(self, name: str) -> DummyExperiment:
        if name.startswith("__"):  # pickle and copy look for what must not be there
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> DummyExperiment:
        return self

    def __getitem__(self, index: Any) -> DummyExperiment:
        return self

    def __setitem__(self, index: Any, value: Any) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class DummyLogger(Logger):
    """`lightning.pytorch.loggers.logger.DummyLogger`. Methods that only some logger has do nothing here, too."""

    def __init__(self) -> None:
        self._experiment = DummyExperiment()

    @property
    def experiment(self) -> DummyExperiment:
        return self._experiment

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None: ...

    def __getitem__(self, index: int) -> DummyExperiment:
        return self._experiment

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._experiment
