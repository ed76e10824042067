"""What `trainyard checkpoints` shows: tables, JSON, and how far long work is. Results on stdout, all else on stderr."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from trainyard.checkpoint.tools.progress import Progress
from trainyard.utilities.optional import has

_QUIET_SECONDS = 5.0
"""Without a terminal: a line no more often than this."""


def fancy(stream: TextIO) -> bool:
    """Whether a person looks at it, and rich is there to draw."""
    return bool(stream and stream.isatty()) and os.environ.get("TERM") != "dumb" and has("rich")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (),
    bad: Callable[[Sequence[str]], bool] = lambda row: False,
) -> None:  # fmt: skip
    """`right`: columns of numbers. `bad`: whether a row is to stand out."""
    if fancy(sys.stdout):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold"
        )
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row), style="red" if bad(row) else None)
        Console().print(table)
        return
    if title:
        print(title)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        print("  ".join(cells).rstrip())


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def size(count: int) -> str:
    """`0 B`, `1.5 GiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def age(seconds: float) -> str:
    """`12s`, `5m`, `3h`, `2d`; of a clock that is ahead, `0s`."""
    left = max(0.0, seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if left >= 2 * length:
            return f"{left / length:.0f}{unit}"
    return f"{left:.0f}s"


def make_progress() -> Progress:
    """A bar on a terminal, lines elsewhere."""
    return _Bar() if fancy(sys.stderr) else Lines()


class _Bar:
    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def begin(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), DownloadColumn(True),
            TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total)
        self._bar.start()

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def end(self) -> None:
        self._bar.stop()


class Lines:
    """`step 120: 3.1 GiB of 8.0 GiB (39 %), 210.0 MiB/s`, now and then."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, write: Callable[[str], None] = warn
    ) -> None:
        self._clock, self._write = clock, write
        self._lock = threading.Lock()
        self._what, self._total, self._done = "", 0, 0
        self._began = self._spoke = 0.0

    def begin(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began = self._spoke = self._clock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = self._clock()
            if now - self._spoke < _QUIET_SECONDS:
                return
            self._spoke = now
            share = 100 * self._done // max(1, self._total)
            speed = size(int(self._done / max(1e-9, now - self._began)))
            self._write(f"{self._what}: {size(self._done)} of {size(self._total)} ({share} %), {speed}/s")

    def end(self) -> None: ...
