"""The example that a module is traced with: from example_input_array through the batch hooks to forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trainyard.export.errors import ExportError

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def example_call(module: LightningModule, given: Any, argument: str, what: str) -> tuple[Args, Kwargs]:
    """Arguments of `module.forward`, on the module's device.

    `given`, or else `module.example_input_array`, goes through on_before_batch_transfer, transfer_batch_to_device and
    on_after_batch_transfer (of the data module, if a trainer is attached that has one which overrides them) as batches
    do. A tensor is the one argument; a tuple or list, all of them; a dict, keyword arguments if forward has
    parameters of these names, otherwise the one argument.
    Raises ExportError if there is no example, or a hook cannot take it.
    """
    sample = given if given is not None else getattr(module, "example_input_array", None)
    if sample is None:
        raise ExportError(
            f"{what} needs an example of what forward takes: give {argument}=..., or set "
            f"self.example_input_array in {type(module).__name__}"
        )
    for name, extra in (
        ("on_before_batch_transfer", ()),
        ("transfer_batch_to_device", (module.device,)),
        ("on_after_batch_transfer", ()),
    ):
        try:
            sample = _hook(module, name)(sample, *extra, 0)
        except Exception as error:
            raise ExportError(
                f"{what}: {name} cannot take the example ({type(error).__name__}: {error}): "
                f"give {argument} in the form of a batch"
            ) from error
    return _as_call(module, sample)


def _hook(module: LightningModule, name: str) -> Callable[..., Any]:
    if module.__dict__.get("_trainer") is None:
        return getattr(module, name)  # type: ignore[no-any-return]
    from trainyard.data.connect import data_hook

    return data_hook(module.trainer, name)  # type: ignore[no-any-return]


def _as_call(module: torch.nn.Module, sample: Any) -> tuple[Args, Kwargs]:
    if isinstance(sample, dict) and _are_parameters(module, sample):
        return (), dict(sample)
    if isinstance(sample, list) or (isinstance(sample, tuple) and not hasattr(sample, "_fields")):
        return tuple(sample), {}
    return (sample,), {}


def _are_parameters(module: torch.nn.Module, sample: dict[Any, Any]) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return all(isinstance(key, str) for key in sample)
    return bool(sample) and set(sample) <= {
        each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
