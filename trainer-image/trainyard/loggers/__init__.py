"""Where logged numbers go."""

from trainyard.loggers.base import Logger
from trainyard.loggers.csv_logger import CSVLogger

__all__ = ["CSVLogger", "Logger"]
