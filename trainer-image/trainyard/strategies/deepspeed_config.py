"""The configuration of DeepSpeed's engine: https://www.deepspeed.ai/docs/config-json."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainyard.errors import MisconfigurationException

Config = dict[str, Any]
_OURS = {
    "optimizer": "make it in configure_optimizers",
    "scheduler": "make it in configure_optimizers",
    "gradient_accumulation_steps": "use Trainer(accumulate_grad_batches=...)",
    "train_batch_size": "it is the DataLoader's batch size times the number of processes and accumulate_grad_batches",
}
"""Keys that the Trainer or the module speaks for."""


def read(given: Mapping[str, Any] | str | Path) -> Config:
    """A configuration as a dict, or in a JSON file; keys that are "auto" are left out, as if they were not there.

    Raises MisconfigurationException that names `config`.
    """
    if isinstance(given, Mapping):
        loaded: Any = copy.deepcopy(dict(given))
    else:
        try:
            loaded = json.loads(Path(given).read_text())
        except (OSError, ValueError) as error:
            raise MisconfigurationException(f"config: cannot read {str(given)!r}: {error}") from error
    if not isinstance(loaded, dict):
        raise MisconfigurationException(
            f"config: {str(given)!r} holds a {type(loaded).__name__}, not an object"
        )
    config: Config = _without_auto(loaded)
    for key, instead in _OURS.items():
        if key in config and not (key == "gradient_accumulation_steps" and config[key] == 1):
            raise MisconfigurationException(f"config: leave {key!r} out; {instead}")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise MisconfigurationException(
            f"config: zero_optimization.stage is {stage!r}, and not 1, 2 or 3; for whole optimizers on each rank there is "
            "strategy='ddp'"
        )
    return config


def make(
    *, stage: int, offload_optimizer: bool, offload_parameters: bool, offload_optimizer_device: str,
    offload_params_device: str, nvme_path: str, pin_memory: bool, params_buffer_count: int, params_buffer_size: int,
    max_in_cpu: int, optimizer_buffer_count: int, aio: Config, activation_checkpointing: Config, **zero: Any,
) -> Config:  # fmt: skip
    """Of DeepSpeedStrategy's arguments; `zero`: those that go into "zero_optimization" as they are.

    Raises MisconfigurationException.
    """
    if stage not in (1, 2, 3):
        raise MisconfigurationException(f"stage: {stage!r} is not 1, 2 or 3")
    if offload_parameters and stage != 3:
        raise MisconfigurationException(
            "offload_parameters: parameters are only partitioned, and offloaded, with stage=3"
        )
    section: Config = {"stage": stage, **zero}
    if offload_optimizer:
        section["offload_optimizer"] = {
            **_device(offload_optimizer_device, nvme_path, "offload_optimizer_device"),
            "buffer_count": optimizer_buffer_count, "pin_memory": pin_memory,
        }  # fmt: skip
    if offload_parameters:
        section["offload_param"] = {
            **_device(offload_params_device, nvme_path, "offload_params_device"),
            "buffer_count": params_buffer_count, "buffer_size": params_buffer_size, "max_in_cpu": max_in_cpu,
            "pin_memory": pin_memory,
        }  # fmt: skip
    config: Config = {"zero_optimization": section, "activation_checkpointing": activation_checkpointing}
    if any(section.get(key, {}).get("device") == "nvme" for key in ("offload_optimizer", "offload_param")):
        config["aio"] = aio
    return config


def with_precision(config: Config, precision: str, loss_scaling: Config) -> Config:
    """`precision` is the Trainer's; a section of the user's own for it stays. Raises MisconfigurationException."""
    if precision in ("16-mixed", "16-true"):
        return {"fp16": {"enabled": True, **loss_scaling}, **config}
    if precision in ("bf16-mixed", "bf16-true"):
        return {"bf16": {"enabled": True}, **config}
    if precision != "32-true":
        raise MisconfigurationException(
            f"precision: {precision!r} is not one of DeepSpeed's: '32-true', '16-mixed', 'bf16-mixed', '16-true', 'bf16-true'"
        )
    for section in ("fp16", "bf16", "bfloat16"):
        if config.get(section, {}).get("enabled"):
            raise MisconfigurationException(
                f"config: {section!r} is enabled, but precision is '32-true'; give Trainer(precision=...) the same"
            )
    return config


def offloads_to_nvme(config: Config) -> bool:
    zero = config["zero_optimization"]
    return any(
        (zero.get(key) or {}).get("device") == "nvme" for key in ("offload_optimizer", "offload_param")
    )


def _device(device: str, nvme_path: str, name: str) -> Config:
    if device not in ("cpu", "nvme"):
        raise MisconfigurationException(f"{name}: {device!r} is neither 'cpu' nor 'nvme'")
    return {"device": device, "nvme_path": nvme_path} if device == "nvme" else {"device": device}


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(each) for key, each in value.items() if each != "auto"}
    return value
