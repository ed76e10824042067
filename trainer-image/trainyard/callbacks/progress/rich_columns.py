"""The columns of `RichProgressBar`. Imports rich: to be imported when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.style import Style
from rich.text import Text

from trainyard.callbacks.progress.printer import duration

if TYPE_CHECKING:
    from trainyard.callbacks.progress.rich_progress import RichProgressBarTheme


def columns(theme: RichProgressBarTheme) -> list[ProgressColumn]:
    return [
        TextColumn("{task.description}", style=theme.description),
        BarColumn(
            complete_style=theme.progress_bar,
            finished_style=theme.progress_bar_finished,
            pulse_style=theme.progress_bar_pulse,
        ),
        BatchesColumn(theme.batch_progress),
        TimesColumn(theme.time),
        SpeedColumn(theme.processing_speed),
        MetricsColumn(theme.metrics),
    ]


class StyledColumn(ProgressColumn):
    """One text in one style."""

    def __init__(self, style: str | Style) -> None:
        super().__init__()
        self.style = style

    def render(self, task: Task) -> Text:
        return Text(self.text(task), style=self.style)

    def text(self, task: Task) -> str:
        raise NotImplementedError


class BatchesColumn(StyledColumn):
    """`3/10`, `3/--` if there is no telling."""

    def text(self, task: Task) -> str:
        total = "--" if task.total is None else f"{int(task.total)}"
        return f"{int(task.completed)}/{total}"


class TimesColumn(StyledColumn):
    """`0:12 < 1:05`: since it began, and until it ends."""

    def text(self, task: Task) -> str:
        elapsed = task.finished_time if task.finished else task.elapsed
        speed, left = speed_of(task), task.remaining
        return f"{_time(elapsed)} < {_time(left / speed if speed and left is not None else None)}"


class SpeedColumn(StyledColumn):
    """`12.3 it/s`, or `2.50 s/it` below one a second."""

    def text(self, task: Task) -> str:
        speed = speed_of(task)
        if not speed:
            return "-- it/s"
        return f"{speed:.1f} it/s" if speed >= 1 else f"{1 / speed:.2f} s/it"


class MetricsColumn(StyledColumn):
    def text(self, task: Task) -> str:
        return str(task.fields.get("metrics", ""))


def speed_of(task: Task) -> float | None:
    """Batches a second: of the last half minute, or since the start as long as there was only one redraw."""
    if (recent := task.finished_speed or task.speed) is not None:
        return recent
    elapsed = task.finished_time or task.elapsed
    done = task.completed - task.fields.get("began", 0)
    return done / elapsed if elapsed and done > 0 else None


def _time(seconds: float | None) -> str:
    return "-:--" if seconds is None else duration(seconds)
