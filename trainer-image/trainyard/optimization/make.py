"""Which optimization a fit has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.errors import MisconfigurationException
from trainyard.optimization.automatic import AutomaticOptimization
from trainyard.optimization.manual import ManualOptimization

if TYPE_CHECKING:
    from trainyard.loops.hooks import HookCaller
    from trainyard.trainer.trainer import Trainer


def make_optimization(trainer: Trainer, call: HookCaller) -> AutomaticOptimization | ManualOptimization:
    """Raises MisconfigurationException where the module's wish and the Trainer's do not go together."""
    automatic = trainer.lightning_module.automatic_optimization
    if not trainer.strategy.virtual_ranks:
        return (AutomaticOptimization if automatic else ManualOptimization)(trainer, call)
    if not automatic:
        raise MisconfigurationException(
            "deterministic='elastic' does not go with automatic_optimization=False: training_step would step once for each "
            "virtual rank"
        )
    from trainyard.optimization.virtual import VirtualOptimization

    return VirtualOptimization(trainer, call)
