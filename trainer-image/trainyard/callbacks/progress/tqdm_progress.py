"""tqdm's bar."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.progress.live import LiveBar
from trainyard.callbacks.progress.progress_bar import Batches, known, short
from trainyard.utilities.optional import require

if TYPE_CHECKING:
    from tqdm import tqdm  # type: ignore[import-untyped]


class TQDMProgressBar(LiveBar):
    """`lightning.pytorch.callbacks.TQDMProgressBar`.

    `refresh_rate` is in batches (and never more than ten times a second), `process_position` the line to start at for
    several bars of one terminal, `leave` keeps the bar of each epoch. To change how a bar looks, override its `init_*_tqdm`.
    Raises ModuleNotFoundError without tqdm.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        require("tqdm", "progress", "TQDMProgressBar")
        super().__init__(refresh_rate)
        self._process_position, self._keep = process_position, leave
        self._bars: dict[str, tqdm[Any]] = {}

    @property
    def process_position(self) -> int:
        return self._process_position

    @property
    def train_progress_bar(self) -> tqdm[Any]:
        """Raises TypeError when there is none; likewise the others."""
        return self._bar("train")

    @property
    def val_progress_bar(self) -> tqdm[Any]:
        return self._bar("sanity" if "sanity" in self._bars else "validation")

    @property
    def test_progress_bar(self) -> tqdm[Any]:
        return self._bar("test")

    @property
    def predict_progress_bar(self) -> tqdm[Any]:
        return self._bar("predict")

    # ---- to be overridden

    def init_sanity_tqdm(self) -> tqdm[Any]:
        return self._make(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> tqdm[Any]:
        return self._make(self.train_description, leave=True)

    def init_validation_tqdm(self) -> tqdm[Any]:
        """Below the training's, and gone when it is over; if there is no training, it stays."""
        below = "train" in self._bars
        return self._make(self.validation_description, below=below, leave=not below)

    def init_test_tqdm(self) -> tqdm[Any]:
        return self._make(self.test_description, leave=True)

    def init_predict_tqdm(self) -> tqdm[Any]:
        return self._make(self.predict_description, leave=True)

    # ---- drawing

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Above the bars."""
        if self._bars:
            tqdm_class().write(sep.join(map(str, args)), **{"file": sys.stdout} | kwargs)
        else:
            print(*args, sep=sep, **kwargs)

    def _open(self, stage: str, description: str, total: Batches) -> None:
        bar = self._bars.get(stage)
        if bar is not None and stage == "train" and self._keep:
            self._close(stage)
            bar = None
        if bar is None:
            bar = self._bars[stage] = getattr(self, f"init_{stage}_tqdm")()
        bar.set_description_str(description, refresh=False)
        bar.initial = 0
        bar.reset(known(total))
        bar.total = known(total)  # reset takes None for "as it was"

    def _place(self, stage: str, start: int) -> None:
        bar = self._bars[stage]
        bar.initial = bar.n = start
        bar.start_t = bar._time()
        bar.refresh()

    def _draw(self, stage: str, done: int, metrics: dict[str, Any] | None) -> None:
        bar = self._bars.get(stage)
        if bar is None:
            return
        bar.n = done
        if metrics is not None:
            text = ", ".join(f"{name}={short(value)}" for name, value in metrics.items())
            bar.set_postfix_str(text, refresh=False)
        bar.refresh()

    def _close(self, stage: str) -> None:
        bar = self._bars.pop(stage, None)
        if bar is not None:
            bar.close()

    def _leave(self) -> None:
        for stage in list(self._bars):
            self._close(stage)

    def _bar(self, stage: str) -> tqdm[Any]:
        if stage not in self._bars:
            raise TypeError(f"TQDMProgressBar has no {stage} bar now")
        return self._bars[stage]

    def _make(self, description: str, *, leave: bool, below: bool = False) -> tqdm[Any]:
        return tqdm_class()(
            desc=description, position=2 * self._process_position + below, disable=self.is_disabled, leave=leave,
            dynamic_ncols=True, file=sys.stdout, smoothing=0, bar_format=self.BAR_FORMAT,
        )  # fmt: skip


@functools.cache
def tqdm_class() -> Any:
    """tqdm without its monitor: redraws are this library's decision, and a thread would trouble those who fork."""
    from tqdm import tqdm

    class Tqdm(tqdm):  # type: ignore[misc]
        monitor_interval = 0

    return Tqdm


def __getattr__(name: str) -> Any:
    if name == "Tqdm":
        return tqdm_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
