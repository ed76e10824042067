"""The model summary in colours."""

from __future__ import annotations

from typing import Any

from trainyard.callbacks.model_summary import ModelSummary
from trainyard.utilities.optional import require

_RIGHT = ("Params", "FLOPs", "In sizes", "Out sizes")


class RichModelSummary(ModelSummary):
    """`lightning.pytorch.callbacks.RichModelSummary`; `summarize_kwargs` may have `header_style`, a style of rich's.

    Raises ModuleNotFoundError without rich.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        require("rich", "progress", "RichModelSummary")
        super().__init__(max_depth, **summarize_kwargs)

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
        from rich import get_console
        from rich.table import Table
        from rich.text import Text

        from trainyard.utilities.summary_table import totals_of

        table = Table(header_style=summarize_kwargs.get("header_style", "bold magenta"))
        for heading, _ in summary_data:
            table.add_column(
                heading, justify="right" if heading in _RIGHT else "left", style="dim" if not heading else ""
            )
        for row in zip(*(cells for _, cells in summary_data), strict=True):
            table.add_row(*map(Text, row))  # "[2, 4]" is no markup
        grid = Table.grid(expand=False, padding=(0, 1, 0, 0))
        grid.add_column(justify="right", style="bold")
        grid.add_column()
        for figure, what in totals_of(
            total_parameters=total_parameters, trainable_parameters=trainable_parameters, model_size=model_size,
            total_training_modes=total_training_modes, total_flops=total_flops,
        ):  # fmt: skip
            grid.add_row(figure, what)
        console = get_console()
        console.print(table)
        console.print(grid)
