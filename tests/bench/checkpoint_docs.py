"""Puts the figures of one `./dev bench checkpoint` into docs/performance.md, and their picture beside it.

    ./dev python -m tests.bench.checkpoint_docs tests/bench/results/DATE-COMMIT-checkpoint.json

All numbers of the page's generated part are the file's; nothing is rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.bench.checkpoint import label
from tests.bench.checkpoint_savers import OURS_IN_A_RUN, YARDSTICK
from tests.bench.checkpoint_states import MIB
from tests.bench.checkpoint_transfer import ALIKE
from tests.bench.main import CHECKOUT
from tests.bench.pages import update

PAGE = CHECKOUT / "docs" / "performance.md"
PICTURE = "checkpoints.png"
BEGIN, END = "<!-- begin: checkpoint figures -->", "<!-- end: checkpoint figures -->"

STALL_MS, TRANSFER, SHARE = 50.0, 0.8, 0.01
"""Issue 5's bounds."""
OURS = ("trainyard to S3", "trainyard to S3, staged on tmpfs", "trainyard to a directory", OURS_IN_A_RUN)
TABLES = {
    "stall_ms": "ms that training stands still for a save",
    "first_stall_ms": "ms, the first save of a process",
    "slower_ms": "ms that steps take longer while a save is under way",
    "whole_ms": "ms until a save is where it should be",
}
Spread = Mapping[str, Any]


def render(page: str, result: dict[str, Any], source: str) -> str:
    """`page` with its generated part made of `result`. Raises ValueError for a page without the two markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must have {BEGIN} and, after it, {END}, once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{figures(result, source)}\n{END}{rest.split(END)[1]}"


def figures(result: dict[str, Any], source: str) -> str:
    """Where it was measured, what the issue's bounds came to, the picture, and all tables."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    sizes: dict[str, dict[str, Any]] = result["sizes"]
    tensors = ", ".join(f"{label(int(n))}: {found['tensors']} tensors" for n, found in sizes.items())
    lines = [
        f"Measured {result['date'][:10]} at commit `{result['commit'][:7]}` on {result['cpu']}, {result['cores']} cores, "
        f"{result['memory_gib']} GiB, load before {result['load_before']:.2f}; {versions}. {result['shape']} ({tensors}). "
        f"Medians, with least to most. All values: [{Path(source).name}]({source}).",
        "",
        f"![How long training stands still for a save]({PICTURE})",
        "",
        *_bounds(sizes, result["automatic"]),
    ]
    for key, title in TABLES.items():
        lines += ["", *_by_size(title, sizes, lambda found: found[key])]  # noqa: B023 - called at once
    for direction in ("upload", "download"):
        lines += ["", *_by_size(
            f"MiB/s, {direction}", sizes, lambda found: found["transfer"][direction]["mib_per_second"]  # noqa: B023
        )]  # fmt: skip
    lines += [
        "",
        *_by_size("Seconds to load, in a fresh process", sizes, lambda found: found["load_seconds"]),
    ]
    lines += ["", *_restarts(sizes)]
    for nbytes, found in sizes.items():
        if found["memory"]:
            lines += ["", *_memory(label(int(nbytes)), found["memory"])]
    return "\n".join(lines)


def _bounds(sizes: dict[str, dict[str, Any]], automatic: dict[str, Any]) -> Iterator[str]:
    yield "| bound | size | median | least to most | held by the median |"
    yield "|---|---|---|---|---|"
    for case in OURS:
        for nbytes, found in sizes.items():
            over = found["stall_over_the_copy_ms"][case]
            yield (
                f"| {case}: a stall of at most the memory copy + {STALL_MS:g} ms | {label(int(nbytes))} | {_ms(over['p50'])} | "
                f"{_ms(over['min'])} to {_ms(over['max'])} | {_held(over['p50'] <= STALL_MS)} |"
            )
    for direction in ("upload", "download"):
        for nbytes, found in sizes.items():
            ratio = found["transfer"][direction]["ours_over"][ALIKE]
            yield (
                f"| {direction}: at least {TRANSFER:.0%} of {ALIKE} | {label(int(nbytes))} | {ratio['p50']:.0%} | "
                f"{ratio['min']:.0%} to {ratio['max']:.0%} | {_held(ratio['p50'] >= TRANSFER)} |"
            )
    for nbytes, found in sizes.items():
        chosen = found["interval"]
        held = _held(chosen["share"] < SHARE)
        yield (
            f"| stall at the automatic interval: under {SHARE:.0%} of the time (computed: every "
            f"{chosen['interval_seconds']:g} s) | {label(int(nbytes))} | {chosen['share']:.2%} | | {held} |"
        )
    yield (
        f"| the same in a run of {automatic['seconds']:.0f} s with {len(automatic['stalls'])} saves | "
        f"{label(automatic['bytes'])} | {automatic['share']:.2%} | | {_held(automatic['share'] < SHARE)} |"
    )


def _held(held: bool) -> str:
    return "yes" if held else "**no**"


def _by_size(title: str, sizes: dict[str, dict[str, Any]], pick: Any) -> Iterator[str]:
    """A row for each case, a column for each size."""
    columns = {label(int(nbytes)): pick(found) for nbytes, found in sizes.items()}
    yield f"| {title} | {' | '.join(columns)} |"
    yield "|---|" + "---|" * len(columns)
    cases = list(dict.fromkeys(case for column in columns.values() for case in column))
    for case in cases:
        cells = [_cell(column[case]) if case in column else "" for column in columns.values()]
        yield f"| {case} | {' | '.join(cells)} |"


def _restarts(sizes: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| Seconds to go on after a restart | size | the engine | from `fit` to the first batch | MiB read |"
    yield "|---|---|---|---|---|"
    for nbytes, found in sizes.items():
        for case, times in found["resume_seconds"].items():
            read = ", ".join(f"{count} from {_SOURCES[name]}" for name, count in times["read"].items())
            yield (
                f"| {case} | {label(int(nbytes))} | {_cell(times['engine'])} | {_cell(times['first batch'])} | {read} |"
            )


_SOURCES = {"local": "this node", "peer": "another node", "store": "S3"}


def _memory(size: str, memory: dict[str, Any]) -> Iterator[str]:
    yield (
        f"| MiB at most during two saves of {size} | the training process | of files that it has mapped | its children | of "
        "files that they have mapped |"
    )
    yield "|---|---|---|---|---|"
    for case, taken in memory["save"].items():
        cells = [f"{taken[k]:g}" for k in ("process anon", "process file", "children anon", "children file")]
        yield f"| {case} | {' | '.join(cells)} |"
    yield ""
    yield f"| MiB at most during a load of {size} | in all | over the state |"
    yield "|---|---|---|"
    for case, taken in memory["load"].items():
        yield f"| {case} | {taken['anon']:g} | {taken['over the state']:g} |"


def _cell(found: Spread) -> str:
    return f"{_number(found['p50'])} ({_number(found['min'])} to {_number(found['max'])})"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def _ms(value: float) -> str:
    return f"{value:+.0f} ms"


def plot(result: dict[str, Any], path: Path) -> None:
    """Stalls by size, one line a case; the memory copy dashed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sizes = {int(nbytes) / MIB: found["stall_ms"] for nbytes, found in result["sizes"].items()}
    figure, axes = plt.subplots(figsize=(10, 5.2))
    colours = iter(plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    for case in next(iter(sizes.values())):
        medians = [stalls[case]["p50"] for stalls in sizes.values()]
        ours = case in OURS
        look = {"linestyle": "--", "color": "black"} if case == YARDSTICK else {"color": next(colours)}
        axes.plot(list(sizes), medians, marker="o", ms=4, lw=2.6 if ours else 1.1, label=case, **look)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(sizes), [label(round(size * MIB)) for size in sizes])
    axes.set_xlabel("state", fontsize=9)
    axes.set_ylabel("ms that training stands still (log scale)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.suptitle(f"{result['shape']}\n{result['cpu']}, commit {result['commit'][:7]}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    update("checkpoint", __doc__, PAGE, PICTURE, render, plot)


if __name__ == "__main__":
    main()
