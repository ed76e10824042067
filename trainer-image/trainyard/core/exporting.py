"""The module's methods that write it to a file for serving. The work is in `trainyard.export`, imported when used."""

from __future__ import annotations

import inspect
import os
from typing import IO, TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch


class ExportMethods:
    """Part of LightningModule."""

    __jit_unused_properties__: ClassVar[list[str]] = []
    """torch.jit.script does not compile these: all properties of the library's own, most of which ask for a trainer."""
    __jit_ignored_attributes__: ClassVar[list[str]] = []
    """Nor does it look at the trainer, and at what the library's classes annotate in ways that it does not know.

    Subclasses add to both lists.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        library = [each for each in cls.__mro__ if each.__module__.partition(".")[0] == "trainyard"]
        properties = {
            name for each in library for name in vars(each) if isinstance(vars(each)[name], property)
        }
        annotated = {name for each in library for name in inspect.get_annotations(each)}
        cls.__jit_unused_properties__ = sorted(properties | set(cls.__jit_unused_properties__))
        cls.__jit_ignored_attributes__ = sorted(annotated | {"_trainer", *cls.__jit_ignored_attributes__})

    def to_onnx(
        self,
        file_path: str | os.PathLike[str] | IO[bytes] | None = None,
        input_sample: Any = None,
        **kwargs: Any,
    ) -> torch.onnx.ONNXProgram | None:
        """See `trainyard.export.to_onnx`."""
        from trainyard.export.onnx import to_onnx

        return to_onnx(self, file_path, input_sample, **kwargs)  # type: ignore[arg-type]

    def to_torchscript(
        self,
        file_path: str | os.PathLike[str] | None = None,
        method: str | None = "script",
        example_inputs: Any = None,
        **kwargs: Any,
    ) -> torch.jit.ScriptModule:
        """See `trainyard.export.to_torchscript`. Deprecated: torch.export is TorchScript's successor."""
        from trainyard.export.torchscript import to_torchscript

        return to_torchscript(self, file_path, method, example_inputs, **kwargs)  # type: ignore[arg-type]

    def to_exported_program(
        self,
        path: str | os.PathLike[str] | None = None,
        input_sample: Any = None,
        dynamic_shapes: Any = None,
        **kwargs: Any,
    ) -> torch.export.ExportedProgram:
        """See `trainyard.export.to_exported_program`."""
        from trainyard.export.exported_program import to_exported_program

        return to_exported_program(self, path, input_sample, dynamic_shapes, **kwargs)  # type: ignore[arg-type]

    def to_safetensors(self, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
        """See `trainyard.export.to_safetensors`."""
        from trainyard.export.safetensors import to_safetensors

        to_safetensors(self, path, metadata)  # type: ignore[arg-type]

    def load_safetensors(self, path: str | os.PathLike[str], strict: bool = True) -> Any:
        """See `trainyard.export.load_safetensors`."""
        from trainyard.export.safetensors import load_safetensors

        return load_safetensors(self, path, strict)  # type: ignore[arg-type]
