"""What a training should be run with: its learning rate, its batch size."""

from trainyard.tuner.tuning import Tuner

__all__ = ["Tuner"]
