"""What validate and test print: a table that reads well in a terminal and in a log."""

from __future__ import annotations


def results_table(found: list[dict[str, float]], title: str) -> str:
    """One column a loader, one row a metric."""
    names = sorted({_bare(name) for values in found for name in values})
    if not names:
        return f"{title}: nothing was logged"
    plain = [{_bare(name): value for name, value in values.items()} for values in found]
    heads = [f"{title} metric"] + (
        [f"loader {i}" for i in range(len(found))] if len(found) > 1 else ["value"]
    )
    rows = [[name, *(f"{values[name]:.6g}" if name in values else "" for values in plain)] for name in names]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]

    def line(cells: list[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    return "\n".join([line(heads), "  ".join("-" * width for width in widths), *map(line, rows)])


def _bare(name: str) -> str:
    return name.split("/dataloader_idx_", maxsplit=1)[0]
