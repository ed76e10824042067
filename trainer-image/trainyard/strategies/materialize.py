"""Weights of layers that were made without any: on the meta device, or with torch.nn.init switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from trainyard.errors import MisconfigurationException


class without_init(TorchFunctionMode):
    """In here the functions of torch.nn.init give their tensor back as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give every layer that is on the meta device memory on `device`, and the weights that its `reset_parameters` makes.

    Children come first, as when layers are made; parameters that are shared stay so. Raises MisconfigurationException for
    a layer that has parameters and no `reset_parameters`.
    """
    shared: dict[int, nn.Parameter] = {}
    for name, part in _children_first(module, ""):
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            _materialize_one(name or type(module).__name__, part, device, shared)


def _children_first(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        yield from _children_first(child, f"{name}.{child_name}" if name else child_name)
    yield name, module


def _materialize_one(
    name: str, part: nn.Module, device: torch.device, shared: dict[int, nn.Parameter]
) -> None:
    reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
    if not callable(reset):
        raise MisconfigurationException(
            f"{name} ({type(part).__name__}) is on the meta device, and has no reset_parameters() that would give its "
            "parameters and buffers their values; give it one, or make it outside of the meta device"
        )
    before = {key: id(parameter) for key, parameter in part._parameters.items() if parameter is not None}
    fresh = any(key not in shared for key in before.values()) or not before
    part.to_empty(device=device, recurse=False)
    for key, old in before.items():
        if old in shared:
            setattr(part, key, shared[old])
        else:
            shared[old] = part._parameters[key]  # type: ignore[assignment]
    if fresh:
        reset()
