"""Copies of state that training cannot change any more, of nothing but tensors and primitives.

What is loaded here was written here: `torch.load(weights_only=True)`, and there is no other way in. Loading needs
torch >= 2.10 (CVE-2026-24747).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointConfigError, CheckpointMismatch, ShardInvalid

if TYPE_CHECKING:
    import torch

_PRIMITIVES = (bool, int, float, complex, str, bytes, type(None))
_SHOWN = 3


def freeze(value: Any, path: str = "checkpoint") -> Any:
    """A deep copy on the CPU. Raises CheckpointConfigError that names what cannot be saved."""
    import torch

    if isinstance(value, torch.Tensor):
        # .to() first: a device tensor is copied once, not twice.
        copy = value.detach().to("cpu")
        return copy.clone() if copy.data_ptr() == value.data_ptr() else copy
    if isinstance(value, _PRIMITIVES) and type(value).__module__ == "builtins":
        return value
    if isinstance(value, OrderedDict | Counter) or type(value) is dict:
        items = {freeze(k, path): freeze(v, f"{path}.{k}") for k, v in value.items()}
        return Counter(items) if isinstance(value, Counter) else items
    if type(value) in (list, tuple, set):
        return type(value)(freeze(v, f"{path}[{i}]") for i, v in enumerate(value))
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    raise CheckpointConfigError(
        f"{path}: a {type(value).__module__}.{type(value).__qualname__} cannot be in a checkpoint, which holds tensors "
        "and primitives only; save a tensor, a number, a string, or a list or dict of those"
    )


def load_file(path: Path, key: str) -> dict[str, Any]:
    """The payload of a shard. Raises ShardInvalid for anything but tensors and primitives; runs nothing of it."""
    import torch

    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # the unpickler's errors have no common type: UnpicklingError, RuntimeError, EOFError, ...
        raise ShardInvalid(
            f"{key}: refused by torch.load(weights_only=True): {_first_line(error)}"
        ) from error
    if not isinstance(payload, dict):
        raise ShardInvalid(f"{key}: holds a {type(payload).__name__}, not a dict")
    return payload


def load_model(module: torch.nn.Module, state: dict[str, Any], source: str) -> None:
    """Load weights. Raises CheckpointMismatch that names parameters and shapes, with the module untouched."""
    have = {k: tuple(v.shape) for k, v in module.state_dict(keep_vars=True).items() if hasattr(v, "shape")}
    saved = {k: tuple(v.shape) for k, v in state.items() if hasattr(v, "shape")}
    problems = [
        f"{name!r} has shape {saved[name]} in the checkpoint and {have[name]} in the model"
        for name in have
        if name in saved and saved[name] != have[name]
    ]
    problems += [f"{name!r} is in the model and not in the checkpoint" for name in have if name not in saved]
    problems += [f"{name!r} is in the checkpoint and not in the model" for name in saved if name not in have]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise CheckpointMismatch(
            f"the checkpoint {source} is of another model: parameter {'; '.join(problems[:_SHOWN])}{more}. Give the model "
            "the arguments it was trained with, or start a new run (a new TrainingRun, or another checkpoint URI)"
        )
    module.load_state_dict(state)


def load_optimizers(optimizers: list[Any], states: list[Any], source: str, what: str = "optimizer") -> None:
    """Load the states of optimizers or schedulers. Raises CheckpointMismatch."""
    if len(optimizers) != len(states):
        raise CheckpointMismatch(
            f"the checkpoint {source} has {len(states)} {what}(s), configure_optimizers returned {len(optimizers)}; "
            "return the same ones, or start a new run"
        )
    for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        try:
            optimizer.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise CheckpointMismatch(
                f"the checkpoint {source} does not fit {what} {number} ({type(optimizer).__name__}): {_first_line(error)}. "
                "Use the one it was trained with, or start a new run"
            ) from error


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
