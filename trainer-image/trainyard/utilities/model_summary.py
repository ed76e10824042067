"""What a model is made of: layers, parameters, operations, sizes. Nothing here prints."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import UninitializedParameter

from trainyard.reproducibility import isolate_rng
from trainyard.utilities.summary_table import (
    format_table,
    get_formatted_model_size,
    get_human_readable_count,
    totals_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger("trainyard")

__all__ = [
    "LayerSummary",
    "ModelSummary",
    "get_formatted_model_size",
    "get_human_readable_count",
    "parse_batch_shape",
    "summarize",
]

UNKNOWN_SIZE = "?"
NOT_APPLICABLE = "n/a"
LEFTOVER_PARAMS = "other params"

Size = str | list[Any]
"""The shape of a tensor, a list of those for several, "?" for what is none."""


@dataclass(slots=True, eq=False)
class LayerSummary:
    """One layer, with everything below it."""

    module: torch.nn.Module
    in_size: Size = UNKNOWN_SIZE
    """Of the positional arguments of the last call."""
    out_size: Size = UNKNOWN_SIZE
    flops: int = 0

    @property
    def layer_type(self) -> str:
        return type(self.module).__name__

    @property
    def num_parameters(self) -> int:
        return sum(_count(p) for p in self.module.parameters())

    @property
    def training(self) -> bool:
        return self.module.training

    def _seen(self, module: Any, inputs: Any, output: Any) -> None:
        self.in_size = parse_batch_shape(inputs[0] if len(inputs) == 1 else inputs)
        self.out_size = parse_batch_shape(output)


class ModelSummary:
    """`lightning.pytorch.utilities.model_summary.ModelSummary`.

    `max_depth`: how many levels of modules are listed; 0 none, -1 all. Sizes and operations are there if the model has
    an `example_input_array`: then its forward runs once with it, in eval mode, without gradients and without moving
    the random generators. Raises ValueError for a depth below -1.
    """

    def __init__(self, model: torch.nn.Module, max_depth: int = 1) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ValueError(f"max_depth: {max_depth!r} is not -1 (all levels), 0 (totals only) or more")
        self._model, self._max_depth = model, max_depth
        self._layers = {name: LayerSummary(module) for name, module in self.named_modules}
        self.total_flops = 0
        """Of one forward with the example: multiplications and additions count apart (torch.utils.flop_counter)."""
        self.measured = getattr(model, "example_input_array", None) is not None and self._measure()
        """Whether sizes and operations are known."""

    # ---- layers

    @property
    def named_modules(self) -> list[tuple[str, torch.nn.Module]]:
        found = [(name, module) for name, module in self._model.named_modules() if name]
        if self._max_depth == -1:
            return found
        return [(name, module) for name, module in found if name.count(".") < self._max_depth]

    def summarize(self) -> dict[str, LayerSummary]:
        """By name, in order of definition."""
        return dict(self._layers)

    @property
    def layer_names(self) -> list[str]:
        return list(self._layers)

    @property
    def layer_types(self) -> list[str]:
        return [layer.layer_type for layer in self._layers.values()]

    @property
    def in_sizes(self) -> list[Size]:
        return [layer.in_size for layer in self._layers.values()]

    @property
    def out_sizes(self) -> list[Size]:
        return [layer.out_size for layer in self._layers.values()]

    @property
    def param_nums(self) -> list[int]:
        return [layer.num_parameters for layer in self._layers.values()]

    @property
    def training_modes(self) -> list[bool]:
        return [layer.training for layer in self._layers.values()]

    @property
    def flop_counts(self) -> dict[str, int]:
        """By layer."""
        return {name: layer.flops for name, layer in self._layers.items()}

    # ---- totals

    @cached_property
    def total_parameters(self) -> int:
        """A parameter that is used in two places counts once."""
        return sum(_count(p) for p in self._model.parameters())

    @cached_property
    def trainable_parameters(self) -> int:
        return sum(_count(p) for p in self._model.parameters() if p.requires_grad)

    @cached_property
    def leftover_parameters(self) -> int:
        """In no listed layer."""
        listed = {id(p) for layer in self._layers.values() for p in layer.module.parameters()}
        return sum(_count(p) for p in self._model.parameters() if id(p) not in listed)

    @property
    def total_layer_params(self) -> int:
        """In the listed layers."""
        return self.total_parameters - self.leftover_parameters

    @cached_property
    def model_size(self) -> float:
        """Of the parameters as they are now, in MB (10^6 bytes)."""
        return sum(_count(p) * p.element_size() for p in self._model.parameters()) / 1e6

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many modules below the root are in which mode."""
        modes = [m.training for m in self._model.modules() if m is not self._model]
        return {"train": sum(modes), "eval": len(modes) - sum(modes)}

    @property
    def has_lazy_parameters(self) -> bool:
        """Some parameters have no shape yet: they count as nothing."""
        return any(isinstance(p, UninitializedParameter) for p in self._model.parameters())

    # ---- tables

    def columns(self) -> list[tuple[str, list[str]]]:
        """Heading and cells, ready to be printed."""
        layers, flops = list(self._layers.values()), self.flop_counts
        table = [
            ("", [str(number) for number in range(len(layers))]),
            ("Name", self.layer_names),
            ("Type", self.layer_types),
            ("Params", [get_human_readable_count(n) for n in self.param_nums]),
            ("Mode", ["train" if training else "eval" for training in self.training_modes]),
            ("FLOPs", [get_human_readable_count(n) if self.measured else "?" for n in flops.values()]),
        ]
        if self.measured:
            table += [
                ("In sizes", [str(s) for s in self.in_sizes]),
                ("Out sizes", [str(s) for s in self.out_sizes]),
            ]
        if self.leftover_parameters > 0:
            for heading, cells in table:
                cells.append(
                    {"": " ", "Name": LEFTOVER_PARAMS, "Params": get_human_readable_count(self.leftover_parameters)}
                    .get(heading, NOT_APPLICABLE)
                )  # fmt: skip
        return table

    def totals(self) -> list[tuple[str, str]]:
        """Figure and what it is of."""
        return totals_of(
            total_parameters=self.total_parameters, trainable_parameters=self.trainable_parameters,
            model_size=self.model_size, total_training_modes=self.total_training_modes,
            total_flops=self.total_flops,
        )  # fmt: skip

    def __str__(self) -> str:
        return format_table(self.columns(), self.totals())

    __repr__ = __str__

    # ---- the forward

    def _measure(self) -> bool:
        """Whether it went well: a summary does not stop a training."""
        from torch.utils.flop_counter import FlopCounterMode

        model = self._model
        handles = [layer.module.register_forward_hook(layer._seen) for layer in self._listening()]
        counter = FlopCounterMode(display=False)
        try:
            with isolate_rng(), _as_it_was(model), torch.no_grad(), _forward_context(model), counter:
                _call(model, _example(model))
        except Exception as error:
            _log.warning(
                "the model summary has no sizes and FLOPs: forward(example_input_array) raised %s: %s",
                type(error).__name__, error,
            )  # fmt: skip
            return False
        finally:
            for handle in handles:
                handle.remove()
        counts = counter.get_flop_counts()
        for name, layer in self._layers.items():
            layer.flops = sum(counts.get(f"{type(model).__name__}.{name}", {}).values())
        self.total_flops = counter.get_total_flops()
        return True

    def _listening(self) -> Iterator[LayerSummary]:
        for layer in self._layers.values():
            if not isinstance(layer.module, torch.jit.ScriptModule):  # takes no hooks
                yield layer


def summarize(lightning_module: torch.nn.Module, max_depth: int = 1) -> ModelSummary:
    """The summary of a module, down to `max_depth` levels. Raises ValueError."""
    return ModelSummary(lightning_module, max_depth)


def parse_batch_shape(batch: Any) -> Size:
    """`[2, 4]` for a tensor; a list of shapes for a list, tuple or dict of tensors; "?" for anything else."""
    if hasattr(batch, "shape"):
        return list(batch.shape)
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return [parse_batch_shape(part) for part in batch]
    return UNKNOWN_SIZE


def _count(parameter: torch.nn.Parameter) -> int:
    return 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()


@contextlib.contextmanager
def _as_it_was(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _forward_context(model: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    trainer = model.__dict__.get("_trainer")
    if trainer is None:
        return contextlib.nullcontext()
    return trainer.precision_plugin.forward_context(trainer.strategy.device)  # type: ignore[no-any-return]


def _example(model: torch.nn.Module) -> Any:
    """The example as a batch of the training gets to the model: through the transfer hooks, on its device."""
    from trainyard.data.batches import to_device
    from trainyard.data.connect import data_hook

    example: Any = model.example_input_array
    trainer = model.__dict__.get("_trainer")
    if trainer is None:
        first = next(model.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        if not hasattr(model, "transfer_batch_to_device"):
            return to_device(example, device)
        example = model.on_before_batch_transfer(example, 0)  # type: ignore[operator]
        example = model.transfer_batch_to_device(example, device, 0)  # type: ignore[operator]
        return model.on_after_batch_transfer(example, 0)  # type: ignore[operator]
    example = data_hook(trainer, "on_before_batch_transfer")(example, 0)
    example = data_hook(trainer, "transfer_batch_to_device")(example, trainer.strategy.device, 0)
    return data_hook(trainer, "on_after_batch_transfer")(example, 0)


def _call(model: torch.nn.Module, example: Any) -> None:
    if isinstance(example, list | tuple):
        model(*example)
    elif isinstance(example, dict):
        model(**example)
    else:
        model(example)
