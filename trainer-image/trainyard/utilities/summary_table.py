"""Figures and tables of a model summary, as text."""

from __future__ import annotations

_UNITS = ("", "K", "M", "B", "T")


def totals_of(
    *, total_parameters: int, trainable_parameters: int, model_size: float, total_training_modes: dict[str, int],
    total_flops: int,
) -> list[tuple[str, str]]:  # fmt: skip
    """The lines under the table."""
    found = [
        (get_human_readable_count(trainable_parameters), "Trainable params"),
        (get_human_readable_count(total_parameters - trainable_parameters), "Non-trainable params"),
        (get_human_readable_count(total_parameters), "Total params"),
        (get_formatted_model_size(model_size), "Total estimated model params size (MB)"),
        (str(total_training_modes["train"]), "Modules in train mode"),
        (str(total_training_modes["eval"]), "Modules in eval mode"),
    ]
    if total_flops:
        found.append((get_human_readable_count(total_flops), "Total FLOPs"))
    return found


def format_table(columns: list[tuple[str, list[str]]], totals: list[tuple[str, str]]) -> str:
    """Columns of equal width, a rule, and the totals."""
    widths = [max(len(heading), *map(len, cells), 0) for heading, cells in columns]
    rows = [[heading for heading, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    figures = [f"{figure:<10}{what}" for figure, what in totals]
    return "\n".join([lines[0], rule, *lines[1:], *([rule] if lines[1:] else []), *figures])


def get_human_readable_count(number: int) -> str:
    """Three digits and a unit: 123 is "123", 1234 "1.2 K", 3e6 "3.0 M". Raises ValueError for less than 0."""
    if number < 0:
        raise ValueError(f"a count of {number} is less than 0")
    amount, unit = float(number), 0
    while round(amount, 1) >= 1000 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    if unit == 0:
        return str(int(number))
    text = f"{amount:.1f}" if amount < 100 else f"{amount:,.0f}"
    return f"{text} {_UNITS[unit]}"


def get_formatted_model_size(megabytes: float) -> str:
    return f"{megabytes:,.3f}"
