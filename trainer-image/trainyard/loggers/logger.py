"""Lightning's module of this name: `from trainyard.loggers.logger import Logger, rank_zero_experiment`."""

from trainyard.loggers.base import Logger
from trainyard.loggers.dummy import DummyExperiment, DummyLogger
from trainyard.loggers.ranks import rank_zero_experiment

__all__ = ["DummyExperiment", "DummyLogger", "Logger", "rank_zero_experiment"]
