"""validate, test and predict: entry points of their own, and the rules of several loaders."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer.models import Regression, loader, trainer
from trainyard.errors import MisconfigurationException
from trainyard.loggers.base import Logger
from trainyard.trainer.states import RunningStage, TrainerFn, TrainerStatus


class Evaluated(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.stages: list[tuple[str, bool]] = []

    def note(self, stage: RunningStage | None) -> None:
        self.stages.append((str(stage), self.training))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note(self.trainer.state.stage)
        self.log("val", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note(self.trainer.state.stage)
        assert not torch.is_grad_enabled()
        self.log("test", self.loss(batch), on_step=True, on_epoch=True)
        self.log("most", self.loss(batch), reduce_fx="max")

    def forward(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0])  # type: ignore[no-any-return]


def mean_loss(model: Regression, count: int) -> float:
    with torch.no_grad():
        return float(model.loss(next(iter(loader(count, count)))))


def test_test_returns_what_was_logged(capsys: pytest.CaptureFixture[str]) -> None:
    model, fit = Evaluated(), trainer()
    found = fit.test(model, loader(10, 4))
    assert [sorted(values) for values in found] == [["most", "test_epoch"]]
    # The last batch is half as large: a mean of samples, not of batches.
    assert found[0]["test_epoch"] == pytest.approx(mean_loss(model, 10), rel=1e-5)
    assert fit.callback_metrics["test_epoch"] == fit.callback_metrics["test"]
    assert model.stages == [("test", False)] * 3
    assert model.training
    assert (fit.state.fn, fit.state.status, fit.state.stage) == (
        TrainerFn.TESTING,
        TrainerStatus.FINISHED,
        None,
    )
    printed = capsys.readouterr().out
    assert "test_epoch" in printed
    assert f"{found[0]['most']:.6g}" in printed


def test_validate_several_loaders_silently(capsys: pytest.CaptureFixture[str]) -> None:
    model, fit = Evaluated(), trainer()
    found = fit.validate(model, [loader(8, 4), loader(4, 4)], verbose=False)
    assert [sorted(values) for values in found] == [["val/dataloader_idx_0"], ["val/dataloader_idx_1"]]
    assert found[1]["val/dataloader_idx_1"] == pytest.approx(mean_loss(model, 4), rel=1e-5)
    assert capsys.readouterr().out == ""
    assert fit.num_val_batches == [2, 1]


def test_predict_gives_the_answers_in_order() -> None:
    model, fit = Evaluated(), trainer()
    answers = fit.predict(model, loader(10, 4))
    assert [len(part) for part in answers or []] == [4, 4, 2]
    with torch.no_grad():
        assert torch.equal(torch.cat(answers or []), model(next(iter(loader(10, 10)))))
    several = fit.predict(model, [loader(8, 4), loader(4, 4)])
    assert [len(part) for part in several or []] == [2, 1]
    assert fit.predict(model, loader(4, 4), return_predictions=False) is None


def test_after_a_fit_the_module_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    model, fit = Evaluated(), trainer()
    fit.fit(model, loader(), loader(4, 4))
    with pytest.raises(
        MisconfigurationException, match="no ModelCheckpoint"
    ):  # Lightning tests the best one by default
        fit.test(dataloaders=loader())
    assert fit.test(model, dataloaders=loader())[0]["test_epoch"] == pytest.approx(
        mean_loss(model, 12), rel=1e-5
    )


@pytest.mark.parametrize("limit", [1, 0.5, 0])
def test_limits(limit: int | float) -> None:
    model = Evaluated()
    fit = trainer(limit_test_batches=limit, limit_predict_batches=limit)
    if limit == 0:
        with pytest.raises(MisconfigurationException, match="no data"):
            fit.test(model, loader(16, 4))
        return
    fit.test(model, loader(16, 4), verbose=False)
    assert len(model.stages) == (1 if limit == 1 else 2)
    assert len(fit.predict(model, loader(16, 4)) or []) == (1 if limit == 1 else 2)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(MisconfigurationException, match="Regression has no test_step"):
        trainer().test(Regression(), loader())
    with pytest.raises(MisconfigurationException, match="define test_dataloader"):
        trainer().test(Evaluated())
    with pytest.raises(MisconfigurationException, match="no module yet"):
        trainer().test(dataloaders=loader())
    with pytest.raises(MisconfigurationException, match="leave one of them out"):
        trainer().test(Evaluated(), loader(), datamodule=L.LightningDataModule())
    with pytest.raises(MisconfigurationException, match="a Linear is no LightningModule"):
        trainer().fit(torch.nn.Linear(1, 1), loader())  # type: ignore[arg-type]


def test_a_data_module_in_the_place_of_the_loaders() -> None:
    stages: list[str] = []

    class Data(L.LightningDataModule):
        def setup(self, stage: str) -> None:
            stages.append(f"setup {stage}")

        def teardown(self, stage: str) -> None:
            stages.append(f"teardown {stage}")

        def test_dataloader(self) -> Any:
            return loader()

        def predict_dataloader(self) -> Any:
            return loader()

    fit = trainer()
    fit.test(Evaluated(), Data(), verbose=False)
    fit.predict(Evaluated(), datamodule=Data())
    assert stages == ["setup test", "teardown test", "setup predict", "teardown predict"]


@pytest.mark.parametrize(
    ("arguments", "epochs", "validations"),
    [
        ({"val_check_interval": 2}, 2, 4),
        ({"val_check_interval": 0.5}, 2, 4),
        ({"check_val_every_n_epoch": 2}, 4, 2),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 3, 4),
        ({"val_check_interval": {"microseconds": 1}}, 2, 8),
        ({"val_check_interval": "00:01:00:00"}, 2, 0),
        ({"limit_val_batches": 0}, 2, 0),
        ({"num_sanity_val_steps": -1}, 1, 1),
    ],
)
def test_when_a_fit_validates(arguments: dict[str, Any], epochs: int, validations: int) -> None:
    ends: list[int] = []

    class Noting(Evaluated):
        def on_validation_end(self) -> None:
            if not self.trainer.sanity_checking:
                ends.append(self.global_step)

    fit = trainer(max_epochs=epochs, **{"num_sanity_val_steps": 0, **arguments})
    fit.fit(Noting(), loader(16, 4), loader(4, 4))
    assert len(ends) == validations
    assert math.isfinite(fit.global_step)


@pytest.mark.parametrize(
    "arguments", [{"val_check_interval": 1.5}, {"val_check_interval": 0}, {"val_check_interval": "soon"},
                  {"check_val_every_n_epoch": None, "val_check_interval": 0.5}],
)  # fmt: skip
def test_intervals_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"val_check_interval|duration"):
        trainer(**arguments)


def test_modes_of_submodules_survive_a_validation() -> None:
    class Frozen(Evaluated):
        def on_train_epoch_start(self) -> None:
            self.net.eval()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert self.training
            assert not self.net.training

    trainer(val_check_interval=1).fit(Frozen(), loader(16, 4), loader(4, 4))


def test_a_validation_in_the_middle_of_an_accumulation_keeps_the_gradients() -> None:
    plain, validated = Regression(), Evaluated()
    trainer(accumulate_grad_batches=4).fit(plain, loader(16, 4))
    trainer(accumulate_grad_batches=4, val_check_interval=1).fit(validated, loader(16, 4), loader(4, 4))
    assert torch.equal(plain.net.weight, validated.net.weight)


def test_evaluation_steps_that_log_each_step_go_to_the_loggers() -> None:
    rows: list[tuple[int | None, dict[str, float]]] = []

    class Memory(Logger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            rows.append((step, dict(metrics)))

    trainer(logger=Memory(), log_every_n_steps=1).test(Evaluated(), loader(8, 4), verbose=False)
    assert [step for step, row in rows if "test_step" in row] == [0, 1]
