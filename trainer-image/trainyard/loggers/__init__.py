"""Where logged numbers go. Each logger is imported when it is first named, its SDK when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.lazy import lazy_names
from trainyard.loggers.base import Logger

if TYPE_CHECKING:
    from trainyard.loggers.comet import CometLogger
    from trainyard.loggers.csv_logs import CSVLogger
    from trainyard.loggers.dummy import DummyLogger
    from trainyard.loggers.mlflow import MLFlowLogger
    from trainyard.loggers.prometheus import PrometheusLogger
    from trainyard.loggers.session import default_logger
    from trainyard.loggers.tensorboard import TensorBoardLogger
    from trainyard.loggers.wandb import WandbLogger

_WHERE = {
    "CSVLogger": "csv_logs",
    "CometLogger": "comet",
    "DummyLogger": "dummy",
    "MLFlowLogger": "mlflow",
    "PrometheusLogger": "prometheus",
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
    "default_logger": "session",
}

__all__ = [
    "CSVLogger",
    "CometLogger",
    "DummyLogger",
    "Logger",
    "MLFlowLogger",
    "PrometheusLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "default_logger",
]

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
