"""How a model runs on one or many processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException
from trainyard.lazy import lazy_names

if TYPE_CHECKING:
    from trainyard.accelerators import Accelerator, Devices
    from trainyard.environment import Place
    from trainyard.plugins.precision import Precision
    from trainyard.strategies.base import Strategy
    from trainyard.strategies.ddp import DDPStrategy
    from trainyard.strategies.deepspeed import DeepSpeedStrategy
    from trainyard.strategies.fsdp import FSDPStrategy
    from trainyard.strategies.model_parallel import ModelParallelStrategy
    from trainyard.strategies.parallel import ParallelStrategy
    from trainyard.strategies.single import SingleDeviceStrategy
    from trainyard.strategies.xla import SingleDeviceXLAStrategy, XLAStrategy

_WHERE = {
    "DDPStrategy": "ddp",
    "DeepSpeedStrategy": "deepspeed",
    "FSDPStrategy": "fsdp",
    "ModelParallelStrategy": "model_parallel",
    "ParallelStrategy": "parallel",
    "SingleDeviceStrategy": "single",
    "SingleDeviceXLAStrategy": "xla",
    "Strategy": "base",
    "XLAStrategy": "xla",
}

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "Strategy",
    "XLAStrategy",
    "equip",
    "make_strategy",
]

__getattr__, __dir__ = lazy_names(__name__, _WHERE)


def make_strategy(
    name: str | Strategy, place: Place, accelerator: str | Accelerator = "auto", *,
    devices: Devices = "auto", processes: int | None = None,
) -> Strategy:  # fmt: skip
    """What `Trainer(strategy=...)` names. `processes`: that the run will have in all, if not those of `place`.

    "auto" is ddp for several processes, else one device. Raises MisconfigurationException.
    """
    from trainyard.accelerators import make_accelerator
    from trainyard.strategies.base import Strategy
    from trainyard.strategies.registry import strategy_by_name
    from trainyard.strategies.single import SingleDeviceStrategy

    several = (processes or place.world_size) > 1
    if isinstance(name, Strategy):
        strategy = name
    elif name == "auto":
        xla = make_accelerator(accelerator).device_type == "xla"
        by_count = ("single_xla", "xla") if xla else ("single_device", "ddp")
        strategy = strategy_by_name(by_count[several])
    else:
        strategy = strategy_by_name(str(name))
    if isinstance(strategy, SingleDeviceStrategy) and place.world_size > 1:
        raise MisconfigurationException(
            f"strategy: single_device, but torchrun started {place.world_size} processes; use 'ddp'"
        )
    strategy.place, strategy.devices = place, devices
    if strategy.accelerator == "auto":  # unless the strategy was given one
        strategy.accelerator = make_accelerator(accelerator)
    if getattr(strategy.accelerator, "device_type", "") == "xla" and "xla" not in strategy.name:
        raise MisconfigurationException(
            f"strategy: {strategy.name!r} does not run on accelerator='tpu'; leave it out, or use 'xla'"
        )
    return strategy


def equip(
    strategy: Strategy, precision: str | int | Precision | None, plugins: Sequence[Any] = (),
    sync_batchnorm: bool = False,
) -> None:  # fmt: skip
    """Give `strategy` its precision and its LayerSync: those that it was made with, or among `plugins`, or the Trainer's.

    Raises MisconfigurationException for two of a kind.
    """
    from trainyard.plugins import LayerSync, TorchSyncBatchNorm
    from trainyard.plugins.precision import Precision, make_precision

    named = {
        "the strategy's precision_plugin": getattr(strategy, "given_precision", None), "precision": precision,
        **{f"plugins[{i}]": plugin for i, plugin in enumerate(plugins) if isinstance(plugin, Precision)},
    }  # fmt: skip
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) > 1:
        raise MisconfigurationException(
            f"{' and '.join(given)}: each of them says in which precision to compute; leave one"
        )
    strategy.precision = make_precision(next(iter(given.values()), None))
    layers = [plugin for plugin in plugins if isinstance(plugin, LayerSync)]
    if len(layers) > 1:
        raise MisconfigurationException("plugins: there can be one LayerSync only")
    strategy.layer_sync = layers[0] if layers else TorchSyncBatchNorm() if sync_batchnorm else None
