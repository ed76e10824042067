"""Progress as lines, by what is in a pipe, and bars of one's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks.progress import ProgressBar, ProgressPrinter, default_progress_bar
from trainyard.callbacks.progress.printer import duration
from trainyard.loggers import CSVLogger


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(default_progress_bar(), ProgressPrinter)
    seconds = iter(range(1000))
    printer = ProgressPrinter(clock=lambda: float(next(seconds)))

    class Net(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("accuracy", 0.25, prog_bar=True)
            return self.loss(batch) * 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(0.123456))

    fit = trainer(callbacks=[printer], enable_progress_bar=True, max_epochs=2, log_every_n_steps=2)
    fit.fit(Net(), loader(16), loader(4))
    lines = re.sub(r" samples/s=\d+", "", capsys.readouterr().out).splitlines()
    assert lines == [
        "epoch 0 step 2/8 loss=0 accuracy=0.25",
        "epoch 0 step 4/8 loss=0 accuracy=0.25 eta=0:02",
        "epoch 0 step 4 validation val_loss=0.1235",
        "epoch 1 step 6/8 loss=0 accuracy=0.25 eta=0:02",
        "epoch 1 step 8/8 loss=0 accuracy=0.25 eta=0:00",
        "epoch 1 step 8 validation val_loss=0.1235",
    ]


def test_a_long_evaluation_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]

    class Slow(Regression):
        def predict_step(self, batch: Any, batch_idx: int) -> int:
            now[0] += 6.0
            return 0

    run = trainer(callbacks=[ProgressPrinter(clock=lambda: now[0])], enable_progress_bar=True)
    run.predict(Slow(), [loader(12), loader(8)])
    assert capsys.readouterr().out.splitlines() == [
        "predicting batch 2/3", "predicting loader 1 batch 1/2"
    ]  # fmt: skip


def test_a_bar_of_ones_own(tmp_path: Path) -> None:
    """Lightning's recipe: a subclass of ProgressBar."""

    class Own(ProgressBar):
        def __init__(self) -> None:
            super().__init__()
            self.enabled = True
            self.seen: list[tuple[Any, ...]] = []

        def disable(self) -> None:
            self.enabled = False

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.seen.append((args[2] + 1, self.total_train_batches, self.get_metrics(trainer, pl_module)))

        def on_validation_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            if self.has_dataloader_changed(dataloader_idx):
                self.seen.append((self.total_val_batches, self.total_val_batches_current_dataloader))

    class Net(Regression):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    own = Own()
    with pytest.raises(TypeError, match="no trainer"):
        _ = own.trainer
    fit = trainer(
        callbacks=[own], enable_progress_bar=True, logger=CSVLogger(tmp_path), num_sanity_val_steps=0
    )
    fit.fit(Net(), loader(8), [loader(12), loader(4)])
    assert own.seen == [(1, 2, {"v_num": 0}), (2, 2, {"v_num": 0}), (4, 3), (4, 1)]
    assert fit.progress_bar_callback is own


def test_durations() -> None:
    assert [duration(s) for s in (5, 754, 3723, 180_000)] == ["0:05", "12:34", "1:02:03", "2 days, 2:00:00"]
