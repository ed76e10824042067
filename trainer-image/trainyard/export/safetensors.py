"""Weights in the safetensors format: tensors and nothing that could run, readable from many languages.

https://huggingface.co/docs/safetensors: each tensor is contiguous and there once; the header has a map of strings.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from trainyard.export.errors import ExportError, missing
from trainyard.export.files import local_path, staged
from trainyard.export.modes import refuse_shards

_SHARED = "trainyard.shared"
"""In the header: a JSON object from the names that were left out to the name of the same tensor that is there."""


def to_safetensors(
    module: torch.nn.Module, path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """`module.state_dict()`. A tensor that several names share (tied weights) is written once.

    The header gets format, class, trainyard and torch versions, and `metadata`.
    Raises ExportError for what is no dense tensor; ModuleNotFoundError without the extra `export`.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise missing("to_safetensors", error) from error

    refuse_shards(module)
    tensors, shared = _without_copies(_dense(module))
    with staged(local_path(path, "path")) as file:
        save_file(tensors, file, metadata={**_header(module, shared), **(metadata or {})})


def load_safetensors(
    module: torch.nn.Module, path: str | os.PathLike[str], strict: bool = True
) -> torch.nn.modules.module._IncompatibleKeys:
    """Load what `to_safetensors`, or another program, wrote. Tied weights need to be there under one name only.

    Returns what `load_state_dict` returns.
    Raises ExportError if names or shapes do not fit; ModuleNotFoundError without the extra `export`.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise missing("load_safetensors", error) from error

    try:
        with safe_open(os.fspath(local_path(path, "path")), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ExportError(f"{os.fspath(path)} is no whole safetensors file: {error}") from error
    _add_copies(module, state, json.loads(metadata.get(_SHARED, "{}")))
    try:
        return module.load_state_dict(state, strict=strict)  # type: ignore[no-any-return]
    except RuntimeError as error:
        origin = f" (written from {metadata['class']})" if "class" in metadata else ""
        raise ExportError(f"{os.fspath(path)}{origin} does not fit: {error}") from error


def _dense(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_quantized:
            kind = str(value.layout) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ExportError(
                f"to_safetensors: {name} is no dense tensor ({kind}), which is all that the format holds: "
                'export with format="state_dict"'
            )
    return state


def _without_copies(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor once, in memory of its own, and which name stands for which other ones."""
    first: dict[Any, str] = {}
    shared: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        kept = first.setdefault(_identity(tensor, name), name)
        if kept != name:
            shared[name] = kept
        else:
            # A clone: safetensors refuses tensors that overlap in memory without being the same.
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, shared


def _add_copies(module: torch.nn.Module, state: dict[str, torch.Tensor], shared: dict[str, str]) -> None:
    """By the file's own word, else by what is tied in `module`."""
    own = module.state_dict()
    tied = {_identity(own[name], name): name for name in own if name in state}
    for name in own:
        if name not in state:
            source = shared.get(name, tied.get(_identity(own[name], name), ""))
            if source in state:
                state[name] = state[source]


def _identity(tensor: Any, name: str) -> Any:
    """Equal for tensors that are the same memory seen in the same way."""
    if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0 or tensor.is_meta:
        return name
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _header(module: torch.nn.Module, shared: dict[str, str]) -> dict[str, str]:
    header = {
        "format": "pt",
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "torch": str(torch.__version__),
        "trainyard": _version(),
    }
    return header | ({_SHARED: json.dumps(shared)} if shared else {})


def _version() -> str:
    try:
        return version("trainyard")
    except PackageNotFoundError:
        return "source"
