"""Progress bars, by what is seen on a real pseudo-terminal, and lines, by what is in a pipe."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from tests.trainer.models import Regression, loader, numbers, trainer
from tests.trainer.terminal import Terminal, terminal
from trainyard.callbacks.progress import (
    ProgressPrinter,
    RichProgressBar,
    RichProgressBarTheme,
    TQDMProgressBar,
    choice,
    default_progress_bar,
)
from trainyard.errors import MisconfigurationException

BARS = pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    with terminal(monkeypatch) as found:
        test = request.node.obj

        @functools.wraps(test)
        def within(*args: Any, **kwargs: Any) -> Any:
            with found.as_stdout():  # not before: when a test begins, pytest puts its own stdout in place
                return test(*args, **kwargs)

        request.node.obj = within
        yield found


class Watched(Regression):
    """Looks at the screen at the end of each hook that is named."""

    def __init__(self, screen: Terminal, *moments: str) -> None:
        super().__init__()
        self.screen, self.moments = screen, moments
        self.seen: dict[str, list[list[str]]] = {}

    def look(self, moment: str) -> None:
        if moment in self.moments:
            self.seen.setdefault(moment, []).append(self.screen.seen())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.look("training_step")
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        return 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look("on_train_batch_end")

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.look("on_sanity_batch" if self.trainer.sanity_checking else "on_validation_batch_end")

    def on_test_batch_end(self, *args: Any) -> None:
        self.look("on_test_batch_end")

    def on_predict_batch_end(self, *args: Any) -> None:
        self.look("on_predict_batch_end")

    def on_train_epoch_end(self) -> None:
        self.look("on_train_epoch_end")


def quick(kind: type[Any], **kwargs: Any) -> Any:
    """A bar for which a second goes by each time that it asks: it is redrawn with each batch."""
    bar = kind(refresh_rate=1, **kwargs)
    seconds = iter(range(10**6))
    bar._clock = lambda: float(next(seconds))
    return bar


def numbers_in(line: str) -> list[str]:
    """`3/6` and the like."""
    return re.findall(r"\b\d+/(?:\d+|\?|--)", line)


@BARS
def test_a_fit_with_two_validation_loaders(kind: type[Any], screen: Terminal) -> None:
    net = Watched(screen, "on_sanity_batch", "on_train_batch_end", "on_validation_batch_end")
    fit = trainer(callbacks=[quick(kind)], enable_progress_bar=True, max_epochs=2, log_every_n_steps=1)
    fit.fit(net, loader(12), [loader(8), loader(4)])

    sanity = net.seen["on_sanity_batch"]
    assert ["Sanity Checking DataLoader 0" in s[-1] for s in sanity] == [True, True, False]
    assert [numbers_in(s[-1]) for s in sanity] == [["1/2"], ["2/2"], ["1/1"]]
    training = net.seen["on_train_batch_end"]
    assert [len(lines) for lines in training] == [1] * 6, training
    assert [lines[0].partition(":")[0].split()[1] for lines in training] == ["0/1"] * 3 + ["1/1"] * 3
    assert [numbers_in(lines[0])[1] for lines in training] == ["1/3", "2/3", "3/3"] * 2
    assert "train_loss" in training[1][0] and "it/s" in training[1][0]
    validation = net.seen["on_validation_batch_end"]
    assert [len(lines) for lines in validation] == [2] * 6
    assert [lines[0].startswith("Epoch") for lines in validation] == [True] * 6
    assert ["Validation DataLoader 1" in lines[1] for lines in validation] == [False, False, True] * 2
    assert [numbers_in(lines[1]) for lines in validation] == [["1/2"], ["2/2"], ["1/1"]] * 2

    (last,) = screen.seen()
    assert last.startswith("Epoch 1/1") and numbers_in(last)[1] == "3/3"
    assert "val_loss/dataloader_idx_0" in last and "val_loss/dataloader_idx_1" in last
    assert screen.cursor


@BARS
def test_validate_test_and_predict(kind: type[Any], screen: Terminal) -> None:
    net = Watched(screen, "on_test_batch_end", "on_predict_batch_end")
    run = trainer(callbacks=[quick(kind)], enable_progress_bar=True)
    run.validate(net, loader(12), verbose=False)
    run.test(net, loader(8), verbose=False)
    run.predict(net, loader(8))
    assert [numbers_in(lines[-1]) for lines in net.seen["on_test_batch_end"]] == [["1/2"], ["2/2"]]
    assert all("Predicting DataLoader 0" in lines[-1] for lines in net.seen["on_predict_batch_end"])
    lines = screen.seen()
    assert [line.split(" DataLoader 0")[0] for line in lines] == ["Validation", "Testing", "Predicting"]
    assert [numbers_in(line) for line in lines] == [["3/3"], ["2/2"], ["2/2"]]
    assert screen.cursor


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (numbers(12)[i] for i in range(12))


@BARS
def test_a_length_that_nobody_knows(kind: type[Any], screen: Terminal) -> None:
    net = Watched(screen, "on_train_batch_end")
    fit = trainer(callbacks=[quick(kind)], enable_progress_bar=True)
    fit.fit(net, DataLoader(Stream(), 4))
    unknown = "?" if kind is TQDMProgressBar else "--"
    found = [re.search(r"(\d+)/(\?|--)", lines[0]) for lines in net.seen["on_train_batch_end"]]
    assert [match and match.groups() for match in found] == [(str(i), unknown) for i in (1, 2, 3)]
    assert re.search(rf"\b3/{re.escape(unknown)}", screen.seen()[0])


@BARS
def test_a_resume_in_the_middle_of_an_epoch_stands_where_it_goes_on(
    kind: type[Any], screen: Terminal, tmp_path: Path
) -> None:
    first = trainer(max_steps=8, max_epochs=2)
    first.fit(Regression(), loader(24))
    first.save_checkpoint(tmp_path / "middle.ckpt")
    net = Watched(screen, "training_step", "on_train_batch_end")
    bar = quick(kind)
    fit = trainer(callbacks=[bar], enable_progress_bar=True, max_epochs=2)
    fit.fit(net, loader(24), ckpt_path=tmp_path / "middle.ckpt")
    assert numbers_in(net.seen["training_step"][0][-1]) == ["1/1", "2/6"]
    assert [numbers_in(s[-1])[1] for s in net.seen["on_train_batch_end"]] == ["3/6", "4/6", "5/6", "6/6"]


@BARS
def test_an_epoch_of_a_resumed_run_knows_its_speed(kind: type[Any]) -> None:
    """What was done before the resume is no work of the seconds since."""
    bar = kind(refresh_rate=1)
    batches = SimpleNamespace(
        is_global_zero=True, current_epoch=0, max_epochs=1, num_training_batches=1000, loggers=[],
        progress_bar_metrics={}, sanity_checking=False, state=SimpleNamespace(fn="fit"),
    )  # fmt: skip
    bar.setup(batches, None, "fit")
    bar.on_train_epoch_start(batches, None)
    bar.on_train_batch_start(batches, None, None, 900)
    bar.on_train_batch_end(batches, None, None, None, 900)
    if kind is TQDMProgressBar:
        shown = bar.train_progress_bar
        assert (shown.initial, shown.n) == (900, 901)
    else:
        from trainyard.callbacks.progress.rich_columns import speed_of

        task = bar.train_progress_bar
        task.start_time -= 10.0  # ten seconds ago
        assert (task.completed, task.fields["began"]) == (901, 900)
        assert speed_of(task) == pytest.approx(0.1, rel=0.1)
    bar.teardown(batches, None, "fit")


@BARS
@pytest.mark.parametrize("error", [ArithmeticError("broken"), KeyboardInterrupt()])
def test_the_terminal_is_given_back_after_an_exception(
    kind: type[Any], error: BaseException, screen: Terminal
) -> None:
    class Broken(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise error
            return super().training_step(batch, batch_idx)

    bar = quick(kind)
    with pytest.raises(type(error)):
        trainer(callbacks=[bar], enable_progress_bar=True).fit(Broken(screen), loader())
    print("and on we go")
    lines = screen.seen()
    assert lines[0].startswith("Epoch 0/0") and lines[-1] == "and on we go"
    assert screen.cursor
    with pytest.raises(TypeError, match="no train bar now"):
        _ = bar.train_progress_bar


@BARS
def test_a_terminal_that_goes_away_ends_no_training(kind: type[Any], screen: Terminal) -> None:
    class Closing(Watched):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.screen.hang_up()

    fit = trainer(callbacks=[quick(kind)], enable_progress_bar=True, max_epochs=2)
    fit.fit(Closing(screen), loader(24))
    assert fit.global_step == 12


@BARS
def test_what_is_printed_stands_above_the_bar(kind: type[Any], screen: Terminal) -> None:
    class Talking(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.print("batch", batch_idx)
            return super().training_step(batch, batch_idx)

    trainer(callbacks=[quick(kind)], enable_progress_bar=True).fit(Talking(screen), loader())
    lines = screen.seen()
    assert lines[:3] == ["batch 0", "batch 1", "batch 2"]
    assert len(lines) == 4 and lines[3].startswith("Epoch 0/0")


@BARS
def test_bars_may_stay(kind: type[Any], screen: Terminal) -> None:
    fit = trainer(callbacks=[quick(kind, leave=True)], enable_progress_bar=True, max_epochs=3)
    fit.fit(Watched(screen), loader())
    lines = screen.seen()
    assert [line[:9] for line in lines] == ["Epoch 0/2", "Epoch 1/2", "Epoch 2/2"]
    assert [numbers_in(line)[1] for line in lines] == ["3/3"] * 3


@BARS
def test_zero_shows_nothing(kind: type[Any], screen: Terminal) -> None:
    bar = kind(refresh_rate=0)
    trainer(callbacks=[bar], enable_progress_bar=True).fit(Watched(screen), loader(), loader())
    assert screen.seen() == [] and bar.is_disabled
    with pytest.raises(MisconfigurationException, match="refresh_rate"):
        kind(refresh_rate=-1)


class Asked(TQDMProgressBar):
    """Counts how often it is drawn."""

    def __init__(self, refresh_rate: int) -> None:
        super().__init__(refresh_rate)
        self.draws: list[int] = []

    def _draw(self, stage: str, done: int, metrics: Any) -> None:
        self.draws.append(done)


def drawn(bar: Asked, seconds_per_batch: float) -> list[int]:
    now = [0.0]
    bar._clock = lambda: now[0]
    bar._total, bar._latest = 20, bar.longest
    for done in range(1, 21):
        now[0] += seconds_per_batch
        if bar._due(done):
            bar._update("train", done)
    return bar.draws


def test_how_often_a_bar_is_drawn() -> None:
    assert drawn(Asked(1), 1.0) == list(range(1, 21))
    assert drawn(Asked(8), 1.0) == [8, 16, 20]
    assert drawn(Asked(1), 0.03) == [1, 5, 9, 13, 17, 20]
    slow = Asked(100)
    slow.longest = 3.0
    assert drawn(slow, 1.0) == [3, 6, 9, 12, 15, 18, 20]


def test_a_step_without_a_redraw_asks_for_no_number(screen: Terminal) -> None:
    class Counting(TQDMProgressBar):
        asked = 0

        def get_metrics(self, *args: Any) -> Any:
            self.asked += 1
            return super().get_metrics(*args)

    bar = Counting(refresh_rate=500)
    trainer(callbacks=[bar], enable_progress_bar=True).fit(Regression(), loader(400))
    assert bar.asked <= 4  # the end of the epoch, in hooks and by itself


def test_numbers_of_a_cpu_are_those_of_the_last_step(screen: Terminal) -> None:
    """They are there already; only those of other devices have to wait for a flush."""
    losses: list[float] = []

    class Telling(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss.detach()))
            return loss

    net = Telling(screen, "on_train_batch_end")
    fit = trainer(callbacks=[quick(TQDMProgressBar)], enable_progress_bar=True, log_every_n_steps=50)
    fit.fit(net, loader(16))
    shown = [re.search(r"train_loss=(\S+?)\]", lines[0]) for lines in net.seen["on_train_batch_end"]]
    assert [match and match.group(1) for match in shown] == [f"{loss:.4g}" for loss in losses]


def test_the_theme(screen: Terminal) -> None:
    theme = RichProgressBarTheme(metrics_format=".1e", metrics_text_delimiter=" | ")
    net = Watched(screen)
    fit = trainer(
        callbacks=[quick(RichProgressBar, theme=theme)], enable_progress_bar=True, log_every_n_steps=1
    )
    fit.fit(net, loader(), loader(4))
    assert re.search(r"train_loss: \d\.\de[+-]\d\d \| val_loss: \d\.\de[+-]\d\d$", screen.seen()[0])


def test_which_bar_there_is_by_default(screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(default_progress_bar(), RichProgressBar)
    assert isinstance(trainer(enable_progress_bar=True).progress_bar_callback, RichProgressBar)
    with monkeypatch.context() as without:
        without.setattr(choice, "has", lambda name: name == "tqdm")
        assert isinstance(default_progress_bar(), TQDMProgressBar)
        without.setattr(choice, "has", lambda name: False)
        assert isinstance(default_progress_bar(), ProgressPrinter)
    with monkeypatch.context() as dumb:
        dumb.setenv("TERM", "dumb")
        assert isinstance(default_progress_bar(), ProgressPrinter)


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], screen: Terminal) -> None:
    for bar in (ProgressPrinter(), RichProgressBar(), TQDMProgressBar()):
        other: Any = SimpleNamespace(
            is_global_zero=False, current_epoch=0, max_epochs=1, num_training_batches=3, global_step=1,
            sanity_checking=False, loggers=[], progress_bar_metrics={"a": 1.0},
            state=SimpleNamespace(fn="fit"),
        )  # fmt: skip
        bar.setup(other, None, "fit")  # type: ignore[arg-type]
        bar.on_train_epoch_start(other, None)  # type: ignore[arg-type]
        bar.on_train_batch_end(other, None, None, None, 2)  # type: ignore[arg-type]
        bar.on_logs_flushed(other, None)  # type: ignore[arg-type]
        bar.on_train_end(other, None)  # type: ignore[arg-type]
    assert screen.seen() == []
