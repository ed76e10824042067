"""Strategies by the name in `Trainer(strategy=...)`."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.strategies.base import Strategy

_DDP = "trainyard.strategies.ddp:DDPStrategy"
_FSDP = "trainyard.strategies.fsdp:FSDPStrategy"
_DEEPSPEED = "trainyard.strategies.deepspeed:DeepSpeedStrategy"
_XLA = "trainyard.strategies.xla:XLAStrategy"
_SINGLE_XLA = "trainyard.strategies.xla:SingleDeviceXLAStrategy"
_SINGLE = "trainyard.strategies.single:SingleDeviceStrategy"

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "single_device": (_SINGLE, {}),
    "single": (_SINGLE, {}),
    **{
        f"ddp{start}{unused}": (_DDP, {"start_method": method, **kwargs})
        for start, method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork"))
        for unused, kwargs in (
            ("", {}),
            ("_find_unused_parameters_true", {"find_unused_parameters": True}),
            ("_find_unused_parameters_false", {"find_unused_parameters": False}),
        )
    },
    "fsdp": (_FSDP, {}),
    "fsdp_cpu_offload": (_FSDP, {"cpu_offload": True}),
    "xla": (_XLA, {}),
    "xla_debug": (_XLA, {"debug": True}),
    "single_xla": (_SINGLE_XLA, {}),
    "single_tpu": (_SINGLE_XLA, {}),
    "deepspeed": (_DEEPSPEED, {}),
    **{f"deepspeed_stage_{stage}": (_DEEPSPEED, {"stage": stage}) for stage in (1, 2, 3)},
    "deepspeed_stage_2_offload": (_DEEPSPEED, {"stage": 2, "offload_optimizer": True}),
    "deepspeed_stage_3_offload": (
        _DEEPSPEED,
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
    "deepspeed_stage_3_offload_nvme": (
        _DEEPSPEED,
        {
            "stage": 3,
            "offload_optimizer": True,
            "offload_parameters": True,
            "offload_optimizer_device": "nvme",
            "offload_params_device": "nvme",
        },
    ),
}
"""Where the class is, and its arguments. Imported when it is asked for."""


def strategy_by_name(name: str) -> Strategy:
    """Raises MisconfigurationException for a name that nobody knows."""
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, ["auto", *STRATEGIES], n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise MisconfigurationException(
            f"strategy: {name!r} is none of {', '.join(repr(n) for n in ['auto', *STRATEGIES])}, or a Strategy{hint}"
        )
    where, kwargs = STRATEGIES[name]
    module, _, kind = where.partition(":")
    made: Strategy = getattr(import_module(module), kind)(**kwargs)
    return made
