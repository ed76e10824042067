"""Durations of actions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainyard.profilers.profiler import Profiler


@dataclass(slots=True)
class Durations:
    """Of one action, in seconds."""

    count: int = 0
    total: float = 0.0
    longest: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


class SimpleProfiler(Profiler):
    """`lightning.pytorch.profilers.SimpleProfiler`: how often each action happened, and how long it took.

    Actions contain one another, so that the shares add up to more than 100 %. What is kept does not grow with time.
    `extended`: also calls and shares. start raises ValueError for an action that is under way, stop for one that is not.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        extended: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        self.durations: dict[str, Durations] = {}
        self._clock = clock
        self.start_time = clock()

    def start(self, action_name: str) -> None:
        if action_name in self.current_actions:
            raise ValueError(f"profiler: {action_name!r} has started already")
        self.current_actions[action_name] = self._clock()

    def stop(self, action_name: str) -> None:
        end = self._clock()
        try:
            took = end - self.current_actions.pop(action_name)
        except KeyError:
            raise ValueError(f"profiler: {action_name!r} has not started") from None
        found = self.durations.get(action_name)
        if found is None:
            found = self.durations[action_name] = Durations()
        found.count += 1
        found.total += took
        found.longest = max(found.longest, took)

    def summary(self) -> str:
        elapsed = self._clock() - self.start_time
        ordered = sorted(self.durations.items(), key=lambda item: item[1].total, reverse=True)
        if not self.extended:
            by_mean = sorted(ordered, key=lambda item: item[1].mean, reverse=True)
            rows = [(name, f"{d.mean:.5}", f"{d.total:.5}") for name, d in by_mean]
            return self._table(("Action", "Mean duration (s)", "Total time (s)"), rows)
        calls = sum(d.count for _, d in ordered)
        rows_extended = [("Total", "-", "-", str(calls), f"{elapsed:.5}", "100 %")] + [
            (
                name, f"{d.mean:.5}", f"{d.longest:.5}", str(d.count), f"{d.total:.5}",
                f"{100 * d.total / elapsed if elapsed else 0:.5}",
            )
            for name, d in ordered
        ]  # fmt: skip
        headings = (
            "Action", "Mean duration (s)", "Longest (s)", "Num calls", "Total time (s)", "Percentage %",
        )  # fmt: skip
        return self._table(headings, rows_extended)

    def _table(self, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (headings, *rows)
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self._heading(), rule, lines[0], rule, *lines[1:], rule])
