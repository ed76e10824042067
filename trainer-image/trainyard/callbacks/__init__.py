"""Callbacks: code that rides along with training. Each is imported when it is first asked for (PEP 562)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.lazy import lazy_names

if TYPE_CHECKING:
    from trainyard.callbacks.base import Callback
    from trainyard.callbacks.batch_size_finder import BatchSizeFinder
    from trainyard.callbacks.checkpoint import Checkpoint
    from trainyard.callbacks.device_stats_monitor import DeviceStatsMonitor
    from trainyard.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
    from trainyard.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
    from trainyard.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
    from trainyard.callbacks.lambda_function import LambdaCallback
    from trainyard.callbacks.lr_finder import LearningRateFinder
    from trainyard.callbacks.lr_monitor import LearningRateMonitor
    from trainyard.callbacks.model_checkpoint import ModelCheckpoint
    from trainyard.callbacks.model_summary import ModelSummary
    from trainyard.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
    from trainyard.callbacks.prediction_writer import BasePredictionWriter, WriteInterval
    from trainyard.callbacks.progress import ProgressBar, ProgressPrinter, RichProgressBar, TQDMProgressBar
    from trainyard.callbacks.rich_model_summary import RichModelSummary
    from trainyard.callbacks.stochastic_weight_avg import StochasticWeightAveraging
    from trainyard.callbacks.throughput_monitor import ThroughputMonitor
    from trainyard.callbacks.timer import Timer
    from trainyard.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging

_WHERE = {
    "Callback": "base",
    "BatchSizeFinder": "batch_size_finder",
    "Checkpoint": "checkpoint",
    "DeviceStatsMonitor": "device_stats_monitor",
    "EarlyStopping": "early_stopping",
    "EarlyStoppingReason": "early_stopping",
    "BackboneFinetuning": "finetuning",
    "BaseFinetuning": "finetuning",
    "GradientAccumulationScheduler": "gradient_accumulation_scheduler",
    "LambdaCallback": "lambda_function",
    "LearningRateFinder": "lr_finder",
    "LearningRateMonitor": "lr_monitor",
    "ModelCheckpoint": "model_checkpoint",
    "ModelSummary": "model_summary",
    "OnExceptionCheckpoint": "on_exception_checkpoint",
    "BasePredictionWriter": "prediction_writer",
    "WriteInterval": "prediction_writer",
    "ProgressBar": "progress",
    "ProgressPrinter": "progress",
    "RichProgressBar": "progress",
    "TQDMProgressBar": "progress",
    "RichModelSummary": "rich_model_summary",
    "StochasticWeightAveraging": "stochastic_weight_avg",
    "ThroughputMonitor": "throughput_monitor",
    "Timer": "timer",
    "EMAWeightAveraging": "weight_averaging",
    "WeightAveraging": "weight_averaging",
}

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "EarlyStoppingReason",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "ProgressPrinter",
    "RichModelSummary",
    "RichProgressBar",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightAveraging",
    "WriteInterval",
]

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
