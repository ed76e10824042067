"""rich's bar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.progress.live import LiveBar
from trainyard.callbacks.progress.progress_bar import Batches, known
from trainyard.utilities.optional import require

if TYPE_CHECKING:
    from rich.progress import Progress, Task, TaskID
    from rich.style import Style

    from trainyard.trainer.trainer import Trainer


@dataclass
class RichProgressBarTheme:
    """Styles of rich's (https://rich.readthedocs.io/en/stable/style.html) for the parts of the bar.

    Metrics are `name: value`, the value in `metrics_format` (Python's format specification), with
    `metrics_text_delimiter` between two of them ("\\n" puts each on a line of its own).
    """

    description: str | Style = ""
    progress_bar: str | Style = "#6206E0"
    progress_bar_finished: str | Style = "#6206E0"
    progress_bar_pulse: str | Style = "#6206E0"
    batch_progress: str | Style = ""
    time: str | Style = "dim"
    processing_speed: str | Style = "dim underline"
    metrics: str | Style = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


class RichProgressBar(LiveBar):
    """`lightning.pytorch.callbacks.RichProgressBar`.

    `refresh_rate` is in batches; whatever it is, the bar is drawn no more than four times a second, and no screen gets
    older than half a second when batches end. `leave` keeps the bar of each epoch, `console_kwargs` go to
    rich's Console. No thread redraws. Raises ModuleNotFoundError without rich.
    """

    shortest = 0.25
    longest = 0.5

    def __init__(
        self,
        refresh_rate: int = 100,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        require("rich", "progress", "RichProgressBar")
        super().__init__(refresh_rate)
        self._keep = leave
        self.theme = theme or RichProgressBarTheme()
        self._console_kwargs = console_kwargs or {}
        self.progress: Progress | None = None
        """rich's; None while nothing is shown."""
        self._tasks: dict[str, TaskID] = {}

    @property
    def train_progress_bar(self) -> Task:
        """Raises TypeError when there is none; likewise the others."""
        return self._task("train")

    @property
    def val_sanity_check_bar(self) -> Task:
        return self._task("sanity")

    @property
    def val_progress_bar(self) -> Task:
        return self._task("validation")

    @property
    def test_progress_bar(self) -> Task:
        return self._task("test")

    # ---- to be overridden

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Columns of rich's: description, bar, batches, times, speed."""
        from trainyard.callbacks.progress import rich_columns

        return rich_columns.columns(self.theme)

    # ---- drawing

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Above the bars."""
        if self.progress is None:
            print(*args, **kwargs)
        else:
            self.progress.console.print(*args, **kwargs)

    def _open(self, stage: str, description: str, total: Batches) -> None:
        progress = self._start()
        task = self._tasks.get(stage)
        if task is not None and stage == "train" and self._keep:
            progress.stop_task(task)
            task = None
        if task is None:
            self._tasks[stage] = progress.add_task(description, total=known(total), metrics="", began=0)
        else:
            progress.reset(task, total=known(total), description=description, start=True)
            progress.update(task, began=0)
            if known(total) is None:
                progress.tasks[progress.task_ids.index(task)].total = None  # reset takes None for "as it was"
        progress.refresh()

    def _place(self, stage: str, start: int) -> None:
        if self.progress is None or stage not in self._tasks:
            return
        # A reset forgets what the speed is made of.
        self.progress.reset(self._tasks[stage], completed=start)
        self.progress.update(self._tasks[stage], began=start)
        self.progress.refresh()

    def _draw(self, stage: str, done: int, metrics: dict[str, Any] | None) -> None:
        if self.progress is None or stage not in self._tasks:
            return
        fields: dict[str, Any] = {} if metrics is None else {"metrics": self._text(metrics)}
        self.progress.update(self._tasks[stage], completed=done, **fields)
        self.progress.refresh()

    def _close(self, stage: str) -> None:
        """Validation within a fit goes away; what was the matter itself stays on the screen."""
        if self.progress is None or stage not in self._tasks:
            return
        task = self._tasks.pop(stage)
        if stage == "sanity" or (stage == "validation" and "train" in self._tasks):
            self.progress.remove_task(task)
        else:
            self.progress.stop_task(task)
        self.progress.refresh()

    def _leave(self) -> None:
        progress, self.progress = self.progress, None
        self._tasks.clear()
        if progress is not None:
            progress.stop()

    def _start(self) -> Progress:
        if self.progress is None:
            from rich import get_console, reconfigure
            from rich.progress import Progress

            if self._console_kwargs:
                reconfigure(**self._console_kwargs)
            console = get_console()
            self.progress = Progress(
                *self.configure_columns(self.trainer), auto_refresh=False, disable=self.is_disabled, console=console
            )  # fmt: skip
            self.progress.start()
        return self.progress

    def _text(self, metrics: dict[str, Any]) -> str:
        def formatted(value: Any) -> str:
            return format(value, self.theme.metrics_format) if isinstance(value, float) else str(value)

        return self.theme.metrics_text_delimiter.join(
            f"{name}: {formatted(value)}" for name, value in metrics.items()
        )

    def _task(self, stage: str) -> Task:
        if self.progress is None or stage not in self._tasks:
            raise TypeError(f"RichProgressBar has no {stage} bar now")
        return next(task for task in self.progress.tasks if task.id == self._tasks[stage])
