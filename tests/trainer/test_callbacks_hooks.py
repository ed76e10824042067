"""Callbacks of users' own see every hook, in Lightning's order; functions as hooks; writers of predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trainyard.callbacks
from tests.trainer.forkhost import Host
from tests.trainer.hook_order import SCENARIOS, expected, record
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks import BasePredictionWriter, Callback, EarlyStopping, LambdaCallback, ModelCheckpoint
from trainyard.callbacks.order import in_order
from trainyard.errors import MisconfigurationException


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_hooks_are_called_in_lightnings_order(scenario: str) -> None:
    assert record("trainyard", scenario) == expected(scenario)


def test_all_hooks_are_in_the_recorded_orders() -> None:
    """Or the test above would say nothing of them."""
    named = {line[6:].partition("(")[0] for scenario in SCENARIOS for line in expected(scenario)}
    hooks = {name for name in dir(Callback) if name.startswith("on_")} | {"setup", "teardown"}
    assert hooks - named == {"on_logs_flushed"}


def test_writers_of_checkpoints_come_last_and_tuners_first() -> None:
    class LearningRateFinder(Callback):
        pass

    checkpoint, plain, stopping, tuner = (
        ModelCheckpoint(),
        Callback(),
        EarlyStopping("x"),
        LearningRateFinder(),
    )
    assert in_order([checkpoint, plain, tuner, stopping]) == [tuner, plain, stopping, checkpoint]


def test_everything_that_is_promised_can_be_imported() -> None:
    for name in trainyard.callbacks.__all__:
        assert getattr(trainyard.callbacks, name).__name__ == name
    with pytest.raises(AttributeError, match="Nonsense"):
        trainyard.callbacks.Nonsense  # noqa: B018


# ---- state


class Counting(Callback):
    """Keeps a count, one for each name."""

    def __init__(self, name: str) -> None:
        self.name, self.batches = name, 0
        self.saved: list[str] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[f"mine-{self.name}"] = self.batches

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.saved.append(checkpoint[f"mine-{self.name}"])


def test_state_of_two_callbacks_of_one_class_is_kept_apart(tmp_path: Path) -> None:
    def fit(counters: list[Callback], **kwargs: Any) -> Any:
        run = trainer(callbacks=counters, **kwargs)
        return run, lambda path: run.fit(Regression(), loader(), ckpt_path=path)

    one, two = Counting("one"), Counting("two")
    run, go = fit([one, two])
    two.batches = 100
    go(None)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again, other = Counting("one"), Counting("two")
    _, go = fit([other, again], max_epochs=2)
    go(tmp_path / "a.ckpt")
    assert (again.batches, other.batches) == (6, 106)
    assert (again.saved, other.saved) == ([3], [103])


# ---- logging


def test_a_callback_logs_as_the_module_does() -> None:
    class Logging(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.log(
                "batches",
                float(trainer.loop_state.total_batches),
                on_step=False,
                on_epoch=True,
                reduce_fx="max",
            )

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.log_dict({"a": 1.0, "b": 2.0})

    fit = trainer(callbacks=Logging())
    fit.fit(Regression(), loader())
    assert {name: float(value) for name, value in fit.callback_metrics.items()} == {
        "batches": 3,
        "a": 1,
        "b": 2,
    }


# ---- functions


def test_functions_as_hooks() -> None:
    said: list[Any] = []
    hooks = LambdaCallback(
        setup=lambda trainer, module, stage: said.append(stage),
        on_train_batch_end=lambda trainer, module, outputs, batch, index: said.append(index),
        on_before_zero_grad=lambda trainer, module, optimizer: said.append(type(optimizer).__name__),
        on_fit_end=None,
    )
    trainer(callbacks=hooks, limit_train_batches=2).fit(Regression(), loader())
    assert said == ["fit", "SGD", 0, "SGD", 1]


def test_a_function_for_what_is_no_hook() -> None:
    with pytest.raises(TypeError, match="'on_lunch' is no hook"):
        LambdaCallback(on_lunch=print)


# ---- predictions


class Predicting(Regression):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch[0].sum(1)


class Writer(BasePredictionWriter):
    def __init__(self, interval: str) -> None:
        super().__init__(interval)
        self.batches: list[Any] = []
        self.epochs: list[Any] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *where: Any) -> None:
        indices, _, batch_idx, dataloader_idx = where
        self.batches.append((prediction.tolist(), list(indices), batch_idx, dataloader_idx))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epochs.append((predictions, batch_indices))


@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
def test_predictions_are_written(interval: str) -> None:
    writer = Writer(interval)
    answers = trainer(callbacks=writer).predict(Predicting(), [loader(12, 4), loader(6, 4)])
    indices = [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], [[0, 1, 2, 3], [4, 5]]]
    batches = [
        (answers[number][index].tolist(), indices[number][index], index, number)
        for number in range(2)
        for index in range(len(indices[number]))
    ]
    assert writer.batches == (batches if interval != "epoch" else [])
    if interval == "batch":
        assert not writer.epochs
    else:
        ((predictions, batch_indices),) = writer.epochs
        assert batch_indices == indices
        assert all(
            torch.equal(a, b)
            for one, other in zip(predictions, answers, strict=True)
            for a, b in zip(one, other, strict=True)
        )


def test_batches_can_be_written_without_keeping_them() -> None:
    writer = Writer("batch")
    assert trainer(callbacks=writer).predict(Predicting(), loader(12, 4), return_predictions=False) is None
    assert len(writer.batches) == 3


def test_a_writer_that_writes_nothing_and_one_of_no_interval() -> None:
    with pytest.raises(NotImplementedError, match="write_on_batch_end"):
        trainer(callbacks=BasePredictionWriter()).predict(Predicting(), loader())
    with pytest.raises(MisconfigurationException, match=r"'week' is none of 'batch', 'epoch'"):
        BasePredictionWriter("week")


RANKS = """
import json, os, sys
from tests.trainer.test_callbacks_hooks import Predicting, Writer
from tests.trainer.models import loader, trainer

writer = Writer("batch_and_epoch")
trainer(callbacks=writer, strategy="ddp").predict(Predicting(), loader(10, 3))
print("RESULT", json.dumps([i for _, indices, _, _ in writer.batches for i in indices]))
print("EPOCH", json.dumps([i for part in writer.epochs[0][1][0] for i in part]))
"""


def test_ranks_write_each_sample_once(host: Host, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    ranks = host.run([str(script)], world=2)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output[-3000:]
    for word in ("RESULT", "EPOCH"):
        parts = [
            eval(line.removeprefix(word))  # noqa: S307 - what the script above has printed
            for rank in ranks
            for line in rank.output.splitlines()
            if line.startswith(word)
        ]
        assert sorted(i for part in parts for i in part) == list(range(10))
        assert all(parts)
