"""Callbacks: code that rides along with training."""

from trainyard.callbacks.base import Callback
from trainyard.callbacks.progress import ProgressPrinter

__all__ = ["Callback", "ProgressPrinter"]
