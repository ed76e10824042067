"""Puts the figures of one `./dev bench trainer` into docs/performance.md, and their picture beside it.

    ./dev python -m tests.bench.trainer_docs tests/bench/results/DATE-COMMIT-trainer.json

All numbers of the page's generated part are the file's; nothing is rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.main import CHECKOUT
from tests.bench.pages import update
from tests.bench.trainer import plot

PAGE = CHECKOUT / "docs" / "performance.md"
PICTURE = "performance.png"
BEGIN, END = "<!-- begin: figures -->", "<!-- end: figures -->"

Spread = dict[str, Any]

# (where the bound is on, the key in the results, the case, the bound, its unit); issue 4.
_BOUNDS = (
    (
        "a step without a log, over the raw loop",
        "microseconds_a_step_over_the_raw_loop",
        "trainyard",
        30.0,
        "us",
    ),
    ("each `self.log`", "microseconds_a_log", "trainyard", 10.0, "us"),
)
_IMPORT_FACTOR = 1.2
_TABLES = {
    "microseconds_a_step": "Microseconds a step",
    "microseconds_a_step_over_the_raw_loop": "Microseconds a step over the raw loop (differences within a round)",
    "microseconds_a_log": "Microseconds for each `self.log`",
    "two_ranks_microseconds_a_step": "Microseconds a step, two ranks",
    "two_ranks_microseconds_over_raw_ddp": "Microseconds a step over raw DDP, two ranks (differences within a round)",
    "microseconds_between_epochs": "Microseconds between two epochs",
    "mib_resident": "MiB resident",
    "import_seconds": "Seconds to import",
}


def render(page: str, result: dict[str, Any], source: str) -> str:
    """`page` with its generated part made of `result`. Raises ValueError for a page without the two markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must have {BEGIN} and, after it, {END}, once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{figures(result, source)}\n{END}{rest.split(END)[1]}"


def figures(result: dict[str, Any], source: str) -> str:
    """Where it was measured, what the issue's bounds came to, the picture, and all tables."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"Measured {result['date'][:10]} at commit `{result['commit'][:7]}` on {result['cpu']}, {result['cores']} cores, "
        f"{result['memory_gib']} GiB, load before {result['load_before']:.2f}; {versions}. {result['shape']}. All values: "
        f"[{Path(source).name}]({source}).",
        "",
        f"![Microseconds a step over the raw loop, and for each self.log]({PICTURE})",
        "",
        *_bounds(result),
    ]
    for key, title in _TABLES.items():
        lines += ["", *_table(title, result[key])]
    return "\n".join(lines)


def _bounds(result: dict[str, Any]) -> Iterator[str]:
    yield "| bound | median | least to most | held by the median |"
    yield "|---|---|---|---|"
    for what, key, case, bound, unit in _BOUNDS:
        found = result[key][case]
        yield f"| {what}: at most {bound:g} {unit} | {_cells(found)} | {_held(found['p50'], bound)} |"
    imports = result["import_seconds"]
    factor = imports["trainyard"]["p50"] / imports["torch"]["p50"]
    yield (
        f"| `import trainyard`: at most {_IMPORT_FACTOR:g} x `import torch` | {factor:.2f} x (of medians) | | "
        f"{_held(factor, _IMPORT_FACTOR)} |"
    )


def _held(value: float, bound: float) -> str:
    return "yes" if value <= bound else "**no**"


def _table(title: str, cases: dict[str, Spread]) -> Iterator[str]:
    yield f"| {title} | median | least to most | trials |"
    yield "|---|---|---|---|"
    for name, found in cases.items():
        yield f"| {name} | {_cells(found)} | {found['trials']} |"


def _cells(found: Spread) -> str:
    return f"{_number(found['p50'])} | {_number(found['min'])} to {_number(found['max'])}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def main() -> None:
    update("trainer", __doc__, PAGE, PICTURE, render, plot)


if __name__ == "__main__":
    main()
