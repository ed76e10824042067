"""How a model runs on one or many processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.environment import Place
    from trainyard.strategies.base import Strategy


def make_strategy(name: str | Strategy, place: Place, accelerator: str) -> Strategy:
    """Raises MisconfigurationException."""
    from trainyard.strategies.base import Strategy
    from trainyard.strategies.ddp import DDPStrategy
    from trainyard.strategies.single import SingleDeviceStrategy

    if isinstance(name, Strategy):
        strategy = name
    elif name in (
        "auto",
        "ddp",
        "ddp_find_unused_parameters_true",
        "ddp_find_unused_parameters_false",
        "single",
    ):
        distributed = place.world_size > 1 or (name.startswith("ddp") and place.launched)
        unused = name == "ddp_find_unused_parameters_true"
        strategy = DDPStrategy(find_unused_parameters=unused) if distributed else SingleDeviceStrategy()
    else:
        raise MisconfigurationException(
            f"strategy: {name!r} is none of 'auto', 'single', 'ddp', or a Strategy"
        )
    if isinstance(strategy, SingleDeviceStrategy) and place.world_size > 1:
        raise MisconfigurationException(
            f"strategy: single, but torchrun started {place.world_size} processes; use 'ddp'"
        )
    strategy.place, strategy.accelerator = place, accelerator
    return strategy
