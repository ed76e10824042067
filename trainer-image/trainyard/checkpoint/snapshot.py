"""What a checkpoint holds, and whether it fits what it is loaded into."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointMismatch

if TYPE_CHECKING:
    import torch

log = logging.getLogger("trainyard.checkpoint")

_PRIMITIVES = (bool, int, float, complex, str, bytes, type(None))
_SHOWN = 3


def foreign(value: Any, path: str = "checkpoint") -> dict[str, str]:
    """What in `value` torch.load(weights_only=True) refuses: {where: type}."""
    import torch

    if isinstance(value, torch.Tensor | torch.Size | torch.device | torch.dtype):
        return {}
    if isinstance(value, _PRIMITIVES) and type(value).__module__ == "builtins":
        return {}
    if isinstance(value, OrderedDict | Counter) or type(value) is dict:
        found = [foreign(v, f"{path}.{k}") for k, v in value.items()] + [foreign(k, path) for k in value]
    elif type(value) in (list, tuple, set):
        found = [foreign(v, f"{path}[{i}]") for i, v in enumerate(value)]
    else:
        return {path: f"{type(value).__module__}.{type(value).__qualname__}"}
    return {where: kind for part in found for where, kind in part.items()}


def load_model(
    module: torch.nn.Module, state: dict[str, Any], source: str, *, strict: bool = True,
    load: Callable[[dict[str, Any]], Any] | None = None,
) -> None:  # fmt: skip
    """Load weights with `load` (module.load_state_dict). Raises CheckpointMismatch that names parameters and shapes,
    with the module untouched. Not `strict`: names that only one of the two has are passed over, shapes are not."""
    have, saved = _shapes(module.state_dict(keep_vars=True)), _shapes(state)
    problems = [
        f"{name!r} has shape {saved[name]} in the checkpoint and {have[name]} in the model"
        for name in have
        if name in saved and saved[name] != have[name]
    ]
    lacking = [f"{name!r} is in the model and not in the checkpoint" for name in have if name not in saved]
    lacking += [f"{name!r} is in the checkpoint and not in the model" for name in saved if name not in have]
    if strict:
        problems += lacking
    elif lacking:
        log.warning("the checkpoint %s is not of the same model: %s", source, "; ".join(lacking[:_SHOWN]))
    # A hook may rename or reshape: then only the loading itself can tell.
    if problems and not any(part._load_state_dict_pre_hooks for part in module.modules()):
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise CheckpointMismatch(
            f"the checkpoint {source} is of another model: parameter {'; '.join(problems[:_SHOWN])}{more}. Give the model "
            "the arguments it was trained with, or start a new run (a new TrainingRun, or another checkpoint URI)"
        )
    try:
        if load is None:
            module.load_state_dict(state, strict=strict)
        else:
            load(state)
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        raise CheckpointMismatch(
            f"the checkpoint {source} is of another model: {_first_line(error)}"
        ) from error


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Without what has none: extra state, and parameters of lazy modules that have not seen a batch."""
    from torch.nn.parameter import is_lazy

    found = {}
    for name, value in state.items():
        if not is_lazy(value) and hasattr(value, "shape"):
            # ZeRO-3 keeps an empty tensor in place of a parameter, with the shape beside it.
            found[name] = tuple(getattr(value, "ds_shape", value.shape))
    return found


def load_optimizers(
    optimizers: list[Any], states: list[Any], source: str, what: str = "optimizer",
    load: Callable[[Any, dict[str, Any]], Any] | None = None,
) -> None:  # fmt: skip
    """Load the states of optimizers or schedulers. Raises CheckpointMismatch."""
    if len(optimizers) != len(states):
        raise CheckpointMismatch(
            f"the checkpoint {source} has {len(states)} {what}(s), configure_optimizers returned {len(optimizers)}; "
            "return the same ones, or start a new run"
        )
    for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        try:
            if load is None:
                optimizer.load_state_dict(state)
            else:
                load(optimizer, state)
        except (ValueError, KeyError) as error:
            raise CheckpointMismatch(
                f"the checkpoint {source} does not fit {what} {number} ({type(optimizer).__name__}): {_first_line(error)}. "
                "Use the one it was trained with, or start a new run"
            ) from error


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
