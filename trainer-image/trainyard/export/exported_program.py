"""torch.export: the whole computation as one graph, in a .pt2 file that needs none of the module's code."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from trainyard.export.errors import ExportError, failing, untraceable
from trainyard.export.files import local_path, staged
from trainyard.export.inputs import Args, Kwargs, example_call
from trainyard.export.modes import evaluating
from trainyard.export.shapes import BATCH, free_batch, with_dims

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from trainyard.core.module import LightningModule

ADVICE = (
    "what depends on the values of tensors must be written with torch.where or torch.cond, sizes that vary belong into "
    "dynamic_shapes, and no .item(), no NumPy and no print between tensors; torch.export.draft_export(module, args) "
    "lists all places at once"
)


def to_exported_program(
    module: LightningModule,
    path: str | os.PathLike[str] | None = None,
    input_sample: Any = None,
    dynamic_shapes: Any = None,
    **kwargs: Any,
) -> ExportedProgram:
    """`module.forward`, in evaluation mode, as torch.export sees it; saved to `path`, which should end in .pt2.

    What was saved is loaded and compared with the module's own answer to the sample before it takes its place.
    `dynamic_shapes` is torch.export's, where a name may stand for a Dim, or "batch": the first size of every tensor is
    free. `kwargs` go to torch.export.export.
    Raises ExportError: no sample, a forward that cannot be traced, or a program that gives other results.
    """
    with evaluating(module):
        args, named = example_call(module, input_sample, "input_sample", "to_exported_program")
        if isinstance(dynamic_shapes, str) and dynamic_shapes == BATCH:
            args, named, dynamic_shapes = free_batch(args, named)
        try:
            program = torch.export.export(
                module, args, named, dynamic_shapes=with_dims(dynamic_shapes), **kwargs
            )
        except Exception as error:
            raise untraceable(module, "torch.export", error, ADVICE) from error
        if path is not None:
            with staged(local_path(path, "path")) as file:
                torch.export.save(program, file)
                _compare(module, torch.export.load(file), args, named)
    return program


def _compare(module: LightningModule, program: ExportedProgram, args: Args, kwargs: Kwargs) -> None:
    with torch.random.fork_rng():
        try:
            expected = module(*args, **kwargs)
        except Exception as error:
            raise failing(module, error) from error
        found = program.module()(*args, **kwargs)
    try:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    except AssertionError as error:
        raise ExportError(
            f"the exported program of {type(module).__name__} gives other results than its forward: {error}\n"
            "forward must give the same for the same input in evaluation mode, and not change the module"
        ) from error
