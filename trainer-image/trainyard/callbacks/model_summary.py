"""A table of the model's layers, once at the start of a fit."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.utilities.optional import has

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer


class ModelSummary(Callback):
    """`lightning.pytorch.callbacks.ModelSummary`: `max_depth` levels of layers, -1 for all, 0 for no summary.

    All ranks take part, because the forward with `example_input_array` may hold collectives; rank 0 prints.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        self._max_depth = max_depth
        self._summarize_kwargs = summarize_kwargs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from trainyard.utilities.model_summary import summarize

        if not self._max_depth:
            return
        summary = summarize(pl_module, self._max_depth)
        if not trainer.is_global_zero:
            return
        if summary.has_lazy_parameters:
            print("The model has lazy layers that have seen no input: their parameters count as 0.")
        self.summarize(
            summary.columns(), summary.total_parameters, summary.trainable_parameters, summary.model_size,
            summary.total_training_modes, total_flops=summary.total_flops, **self._summarize_kwargs,
        )  # fmt: skip

    @staticmethod
    def summarize(  # noqa: PLR0917 - Lightning's signature
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print it: columns of (heading, cells), and totals. `model_size` is in MB. To be overridden."""
        from trainyard.utilities.summary_table import format_table, totals_of

        totals = totals_of(
            total_parameters=total_parameters, trainable_parameters=trainable_parameters, model_size=model_size,
            total_training_modes=total_training_modes, total_flops=total_flops,
        )  # fmt: skip
        print(format_table(summary_data, totals), flush=True)


def default_model_summary() -> ModelSummary:
    """What Trainer(enable_model_summary=True) uses: colours where somebody sees them."""
    from trainyard.callbacks.rich_model_summary import RichModelSummary

    return RichModelSummary() if has("rich") and sys.stdout.isatty() else ModelSummary()
