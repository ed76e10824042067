"""From a trained module to a file that something else can serve: ONNX, TorchScript, torch.export, plain weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.lazy import lazy_names

if TYPE_CHECKING:
    from trainyard.export.dispatch import FORMATS, export, export_checkpoint, format_of
    from trainyard.export.errors import ExportError
    from trainyard.export.exported_program import to_exported_program
    from trainyard.export.onnx import to_onnx
    from trainyard.export.runs import checkpoint_of_run
    from trainyard.export.safetensors import load_safetensors, to_safetensors
    from trainyard.export.torchscript import to_torchscript

_WHERE = {
    "FORMATS": "dispatch",
    "ExportError": "errors",
    "checkpoint_of_run": "runs",
    "export": "dispatch",
    "export_checkpoint": "dispatch",
    "format_of": "dispatch",
    "load_safetensors": "safetensors",
    "to_exported_program": "exported_program",
    "to_onnx": "onnx",
    "to_safetensors": "safetensors",
    "to_torchscript": "torchscript",
}

__all__ = [
    "FORMATS",
    "ExportError",
    "checkpoint_of_run",
    "export",
    "export_checkpoint",
    "format_of",
    "load_safetensors",
    "to_exported_program",
    "to_onnx",
    "to_safetensors",
    "to_torchscript",
]

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
