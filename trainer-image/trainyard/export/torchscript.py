"""TorchScript: still what TorchServe and LibTorch programs load, though torch has deprecated it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainyard.export.errors import ExportError, untraceable
from trainyard.export.files import local_path, staged
from trainyard.export.inputs import example_call
from trainyard.export.modes import evaluating

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule

_SCRIPT_ADVICE = (
    "forward may use only TorchScript's part of Python (typed arguments, no *args, no third-party calls); method='trace' "
    "records what one example does; to_exported_program is what torch recommends instead"
)
_TRACE_ADVICE = (
    "forward must take and return tensors, or tuples, lists and dicts of them; give strict=False for a dict; "
    "to_exported_program is what torch recommends instead"
)


def to_torchscript(
    module: LightningModule,
    file_path: str | os.PathLike[str] | None = None,
    method: str | None = "script",
    example_inputs: Any = None,
    **kwargs: Any,
) -> torch.jit.ScriptModule:
    """`module.forward`, in evaluation mode, compiled ("script") or recorded with an example ("trace").

    The train mode of every submodule is as before. `kwargs` go to torch.jit.script or torch.jit.trace.
    Warns with a DeprecationWarning, as torch deprecates TorchScript.
    Raises ExportError: another method, no example to trace with, or a forward that TorchScript cannot take.
    """
    warnings.warn(
        "TorchScript is deprecated by torch: torch.export is its successor, see to_exported_program",
        DeprecationWarning,
        stacklevel=3,
    )
    target = None if file_path is None else local_path(file_path)
    if method not in ("script", "trace"):
        raise ExportError(f"to_torchscript: method is 'script' or 'trace', not {method!r}")
    with evaluating(module), _one_warning_is_enough():
        scripted = _trace(module, example_inputs, kwargs) if method == "trace" else _script(module, kwargs)
        if target is not None:
            with staged(target) as file:
                torch.jit.save(scripted, file)
    return scripted


def _script(module: LightningModule, kwargs: dict[str, Any]) -> torch.jit.ScriptModule:
    try:
        with _without_trainer(module, also_attached=True):
            return torch.jit.script(module, **kwargs)  # type: ignore[no-any-return]
    except Exception as error:
        raise untraceable(module, "TorchScript", error, _SCRIPT_ADVICE) from error


def _trace(module: LightningModule, example: Any, kwargs: dict[str, Any]) -> torch.jit.ScriptModule:
    args, named = example_call(module, example, "example_inputs", "to_torchscript(method='trace')")
    try:
        # Not both: torch refuses, and records by keyword only if there are no positional arguments.
        inputs = {"example_kwarg_inputs": named} if named else {"example_inputs": args}
        with _without_trainer(module, also_attached=False):
            return torch.jit.trace(module, **inputs, **kwargs)  # type: ignore[no-any-return, no-untyped-call]
    except Exception as error:
        raise untraceable(module, "TorchScript", error, _TRACE_ADVICE) from error


class _NoTrainer:
    """Where a property asks it for anything it gets an AttributeError, which is what torch.jit puts up with."""


@contextlib.contextmanager
def _without_trainer(module: torch.nn.Module, *, also_attached: bool) -> Iterator[None]:
    """torch.jit reads every property, also those that it then leaves out, and these raise without a trainer."""
    held = [(each, each.__dict__["_trainer"]) for each in module.modules() if "_trainer" in each.__dict__]
    for each, trainer in held:
        if trainer is None or also_attached:
            each.__dict__["_trainer"] = _NoTrainer()
    try:
        yield
    finally:
        for each, trainer in held:
            each.__dict__["_trainer"] = trainer


@contextlib.contextmanager
def _one_warning_is_enough() -> Iterator[None]:
    """torch says the same for each of its functions that is called."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
        yield
