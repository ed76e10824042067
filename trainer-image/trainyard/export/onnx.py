"""ONNX, by torch's exporter on top of torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from trainyard.export.errors import ExportError, missing, untraceable
from trainyard.export.exported_program import ADVICE
from trainyard.export.files import local_path, staged
from trainyard.export.inputs import Args, Kwargs, example_call
from trainyard.export.modes import evaluating
from trainyard.export.shapes import BATCH, free_batch, from_axes

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

    from trainyard.core.module import LightningModule


def to_onnx(
    module: LightningModule,
    file_path: str | os.PathLike[str] | IO[bytes] | None = None,
    input_sample: Any = None,
    **kwargs: Any,
) -> ONNXProgram | None:
    """`module.forward`, in evaluation mode, as an ONNX model; the train mode of every submodule is as before.

    `file_path` is a file's path, a binary file object, or None to get the program only. `input_sample` is a tensor, a
    tuple of arguments or a dict (default: `example_input_array`). `kwargs` go to torch.onnx.export: `dynamic_shapes`
    (also "batch": the first size of every tensor is free) or the older `dynamic_axes`, `input_names`, `opset_version`,
    `external_data` (default here: only if the weights do not fit into one file, which ends at 2 GB; they are then in
    FILE.data beside it), `dynamo=False` for the exporter on TorchScript, which returns None, ...
    Raises ExportError: no sample, a forward that cannot be traced; ModuleNotFoundError without the extra `export`.
    """
    dynamo = kwargs.get("dynamo", True)
    _need_packages(dynamo)
    if file_path is None and not dynamo:
        raise ExportError("to_onnx(dynamo=False) can only write: give file_path")
    with evaluating(module):
        args, named = example_call(module, input_sample, "input_sample", "to_onnx")
        args, named, kwargs = _shapes(module, args, named, kwargs)
        with _destination(file_path) as file, _quiet(kwargs.setdefault("verbose", False)):
            return _write(module, args, named, file, **kwargs)


def _write(
    module: LightningModule,
    args: Args,
    named: Kwargs,
    file: Path | None,
    external_data: bool | None = None,
    **kwargs: Any,
) -> ONNXProgram | None:
    if not kwargs.get("dynamo", True):
        kwargs["f"] = file
    if args and isinstance(args[-1], dict):
        args = (*args, {})  # torch takes a last argument that is a dict for the named ones
    try:
        program = torch.onnx.export(module, args, kwargs=named or None, **kwargs)
    except Exception as error:
        if not _is_about_forward(error):
            raise
        raise untraceable(module, "torch.onnx", error, ADVICE) from error
    if program is not None and file is not None:
        program.save(file, external_data=external_data)
        _drop_empty_sidecar(file)
    return program


def _shapes(
    module: LightningModule, args: Args, named: Kwargs, kwargs: dict[str, Any]
) -> tuple[Args, Kwargs, dict[str, Any]]:
    """What torch.onnx.export is to be called with, in the forms that it understands."""
    kwargs = dict(kwargs)
    shapes = kwargs.get("dynamic_shapes")
    if isinstance(shapes, str) and shapes == BATCH:
        args, named, kwargs["dynamic_shapes"] = free_batch(args, named)
    if kwargs.get("dynamo", True) and (axes := kwargs.pop("dynamic_axes", None)):
        if shapes is not None:
            raise ExportError("to_onnx: give dynamic_shapes or dynamic_axes, not both")
        kwargs["dynamic_shapes"] = from_axes(module, axes, (args, named), kwargs.get("input_names"))
    return args, named, kwargs


def _need_packages(dynamo: bool) -> None:
    try:
        import onnx  # noqa: F401

        if dynamo:
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing("to_onnx", error) from error


def _is_about_forward(error: Exception) -> bool:
    """Not a wrong argument of torch.onnx.export itself."""
    return (
        isinstance(error, torch.onnx.errors.OnnxExporterError | RuntimeError) or error.__cause__ is not None
    )


@contextlib.contextmanager
def _destination(target: str | os.PathLike[str] | IO[bytes] | None) -> Iterator[Path | None]:
    """A path to write to: what is there in the end gets to `target`."""
    if target is None:
        yield None
    elif isinstance(target, str | os.PathLike):
        with staged(local_path(target)) as file:
            yield file
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            yield file
            if len(list(file.parent.iterdir())) > 1:
                raise ExportError(
                    "to_onnx: weights beside the model, or of more than 2 GB, need a file's path"
                )
            target.write(file.read_bytes())


def _drop_empty_sidecar(file: Path) -> None:
    sidecar = file.with_name(f"{file.name}.data")
    if sidecar.exists() and sidecar.stat().st_size == 0:
        sidecar.unlink()


@contextlib.contextmanager
def _quiet(verbose: bool | None) -> Iterator[None]:
    """Without torch's progress lines, the graphs that it prints when it fails, and its regrets about torchvision."""
    if verbose:
        yield
        return
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    if find_spec("torchvision") is None:
        registration.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*torch\.jit", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r".*axis name.*shares the same shape constraints")
            yield
    finally:
        registration.setLevel(level)
