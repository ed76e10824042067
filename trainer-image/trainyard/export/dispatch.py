"""One function for all formats."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.export.errors import ExportError
from trainyard.export.files import local_path, staged
from trainyard.export.runs import as_file

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule

SUFFIXES: Mapping[str, str] = {
    ".onnx": "onnx",
    ".pt": "torchscript",
    ".ts": "torchscript",
    ".pt2": "pt2",
    ".safetensors": "safetensors",
    ".pth": "state_dict",
    ".bin": "state_dict",
}


def export(
    module: LightningModule,
    path: str | os.PathLike[str],
    format: str | None = None,
    input_sample: Any = None,
    **options: Any,
) -> Path:
    """Write `module` to `path` in one of FORMATS, by default the one that the suffix stands for. Returns the path.

    `input_sample` (default: the module's example_input_array) is what it is traced with, where it is traced;
    `options` are those of `to_onnx`, `to_torchscript`, `to_exported_program` or `to_safetensors`.
    Raises ExportError for an unknown format, an option that the format has no use for, and what those functions raise.
    """
    target = local_path(path, "path")
    chosen = format_of(target, format)
    try:
        _WRITERS[chosen](module, target, input_sample, **options)
    except TypeError as error:
        if unknown := [name for name in options if f"'{name}'" in str(error)]:
            raise ExportError(f"format {chosen!r} has no option {unknown[0]!r}") from error
        raise
    return target


def export_checkpoint(
    module_class: type[LightningModule],
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: str | None = None,
    input_sample: Any = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """`export` of what `module_class.load_from_checkpoint(checkpoint, **arguments)` gives, on the CPU.

    `checkpoint` may also be where a TrainingRun saves: see `checkpoint_of_run`.
    """
    format_of(local_path(path, "path"), format)  # before minutes of loading
    with as_file(checkpoint) as file:
        module: Any = module_class.load_from_checkpoint(file, **{"map_location": "cpu", **(arguments or {})})
    return export(module, path, format, input_sample, **options)


def format_of(path: str | os.PathLike[str], format: str | None = None) -> str:
    """`format`, or what the path's suffix stands for. Raises ExportError if there is no such format."""
    suffix = Path(path).suffix.lower()
    if format is None and suffix not in SUFFIXES:
        raise ExportError(
            f"path: no format is known by the suffix {suffix!r} of {os.fspath(path)!r}: give format, "
            f"one of {', '.join(FORMATS)}, or a suffix of {', '.join(SUFFIXES)}"
        )
    chosen = SUFFIXES[suffix] if format is None else format
    if chosen not in FORMATS:
        raise ExportError(f"format: {chosen!r} is none of {', '.join(FORMATS)}")
    return chosen


def _onnx(module: LightningModule, path: Path, sample: Any, **options: Any) -> None:
    from trainyard.export.onnx import to_onnx

    to_onnx(module, path, sample, **options)


def _torchscript(module: LightningModule, path: Path, sample: Any, **options: Any) -> None:
    from trainyard.export.torchscript import to_torchscript

    to_torchscript(module, path, example_inputs=sample, **options)


def _pt2(module: LightningModule, path: Path, sample: Any, **options: Any) -> None:
    from trainyard.export.exported_program import to_exported_program

    to_exported_program(module, path, sample, **options)


def _safetensors(module: LightningModule, path: Path, sample: Any, **options: Any) -> None:
    from trainyard.export.safetensors import to_safetensors

    to_safetensors(module, path, **options)


def _state_dict(module: LightningModule, path: Path, sample: Any) -> None:
    import torch

    from trainyard.export.modes import refuse_shards

    refuse_shards(module)
    with staged(path) as file:
        torch.save(module.state_dict(), file)


_WRITERS: Mapping[str, Callable[..., None]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "pt2": _pt2,
    "safetensors": _safetensors,
    "state_dict": _state_dict,
}
FORMATS: tuple[str, ...] = tuple(_WRITERS)
"""What `export` can write."""
