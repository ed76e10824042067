"""The Trainer: what it is made of, and what it says of itself."""

from trainyard.reproducibility import seed_everything
from trainyard.trainer.trainer import Trainer

__all__ = ["Trainer", "seed_everything"]
