"""Lightning's place for what `LightningModule.optimizers()` gives."""

from trainyard.optimization.manual import LightningOptimizer

__all__ = ["LightningOptimizer"]
