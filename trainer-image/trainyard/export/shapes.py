"""Which sizes of the inputs are free in the exported program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from trainyard.export.errors import ExportError
from trainyard.export.inputs import Args, Kwargs

BATCH = "batch"
"""As `dynamic_shapes`: the first size of every tensor is free, and the same for all."""


def free_batch(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs, Any]:
    """The call with at least two samples, and the `dynamic_shapes` that leave their number free.

    torch.export takes a size of 1 for a constant: a sample of one is doubled.
    Raises ExportError if the tensors do not have the same first size.
    """
    tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    sizes = {each.size(0) if each.ndim else None for each in tensors}
    if len(sizes) != 1 or None in sizes:
        raise ExportError(
            f'dynamic_shapes="batch" needs tensors with the same first size, not '
            f"{[tuple(each.shape) for each in tensors]}: give dynamic_shapes for each input"
        )
    if sizes == {1}:
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda each: torch.cat([each, each]), (args, kwargs)
        )
    shapes = pytree.tree_map(
        lambda each: {0: BATCH} if isinstance(each, torch.Tensor) else None, kwargs if kwargs else args
    )
    return args, kwargs, shapes


def with_dims(shapes: Any) -> Any:
    """`dynamic_shapes` for torch.export, where names may stand for dimensions, as torch.onnx allows too."""
    dims: dict[str, Any] = {}

    def convert(shape: Any) -> Any:
        if isinstance(shape, str):
            return dims.setdefault(shape, torch.export.Dim(shape))
        if isinstance(shape, Mapping):
            return {key: convert(value) for key, value in shape.items()}
        if isinstance(shape, list | tuple):
            return type(shape)(convert(value) for value in shape)
        return shape

    return convert(shapes)


def from_axes(
    module: torch.nn.Module,
    axes: Mapping[str, Any],
    call: tuple[Args, Kwargs],
    input_names: Sequence[str] | None,
) -> Any:
    """`dynamic_shapes` that say the same as the older `dynamic_axes`: {input's name: {axis: name} or [axis, ...]}.

    Entries for outputs say nothing: the shapes of outputs follow from those of the inputs.
    Raises ExportError where inputs are not all tensors: the older form cannot name what is inside of them.
    """
    args, kwargs = call
    values = list(args) + list(kwargs.values())
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise ExportError("dynamic_axes: only for inputs that are tensors: give dynamic_shapes in its place")
    names = list(input_names or [*list(inspect.signature(module.forward).parameters)[: len(args)], *kwargs])
    shapes = [_shape(name, axes.get(name)) for name in names[: len(values)]]
    return dict(zip(kwargs, shapes, strict=True)) if kwargs else tuple(shapes)


def _shape(name: str, axes: Any) -> dict[int, str] | None:
    if not axes:
        return None
    return dict(axes) if isinstance(axes, Mapping) else {axis: f"{name}_dim_{axis}" for axis in axes}
