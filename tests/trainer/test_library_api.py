"""Names, signatures and messages of the library; `self.log`; the CSV logger; seeds."""

from __future__ import annotations

import csv
import inspect
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trainyard as L
from tests.trainer.forkhost import Host
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks.progress import ProgressPrinter
from trainyard.errors import MisconfigurationException
from trainyard.loggers import CSVLogger
from trainyard.reproducibility import rng_state, set_rng_state

LIGHTNING = {
    "accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": None, "logger": None,
    "callbacks": None, "fast_dev_run": False, "max_epochs": None, "min_epochs": None, "max_steps": -1, "min_steps": None,
    "max_time": None, "limit_train_batches": None, "limit_val_batches": None, "limit_test_batches": None,
    "limit_predict_batches": None, "overfit_batches": 0.0, "val_check_interval": None, "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": None, "log_every_n_steps": None, "enable_checkpointing": None, "enable_progress_bar": None,
    "enable_model_summary": None, "accumulate_grad_batches": 1, "gradient_clip_val": None,
    "gradient_clip_algorithm": None, "deterministic": None, "benchmark": None, "inference_mode": True,
    "use_distributed_sampler": True, "profiler": None, "detect_anomaly": False, "barebones": False, "plugins": None,
    "sync_batchnorm": False, "reload_dataloaders_every_n_epochs": 0, "default_root_dir": None,
    "enable_autolog_hparams": True, "model_registry": None, "suggest_integrations": True,
}  # fmt: skip
"""Lightning 2.6's Trainer.__init__."""


def test_the_public_names() -> None:
    assert sorted(L.__all__) == [
        "Callback", "CheckpointConfig", "DataModule", "LightningDataModule", "LightningModule", "Module", "Trainer",
        "seed_everything",
    ]  # fmt: skip
    assert all(getattr(L, name) is not None for name in L.__all__)
    assert L.Module is L.LightningModule
    assert L.DataModule is L.LightningDataModule
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = L.Trainr  # type: ignore[attr-defined]


def test_the_trainers_arguments_are_lightnings() -> None:
    ours = {
        n: p.default for n, p in inspect.signature(L.Trainer).parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    assert {n: ours[n] for n in ours if n not in ("checkpoint", "virtual_ranks")} == LIGHTNING


def test_fit_and_log_have_lightnings_parameters() -> None:
    assert list(inspect.signature(L.Trainer.fit).parameters)[1:] == [
        "model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only",
    ]  # fmt: skip
    assert list(inspect.signature(L.LightningModule.log).parameters)[1:] == [
        "name", "value", "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph", "sync_dist",
        "sync_dist_group", "add_dataloader_idx", "batch_size", "metric_attribute", "rank_zero_only",
    ]  # fmt: skip


def test_unknown_arguments_and_values() -> None:
    with pytest.raises(TypeError, match="no argument 'max_epoch'; the nearest is 'max_epochs'"):
        L.Trainer(max_epoch=3)
    for name, value in {
        "precision": "fp8", "accelerator": "abacus", "accumulate_grad_batches": 0, "gradient_clip_algorithm": "both",
        "max_epochs": 1.5, "limit_val_batches": 2.5, "deterministic": "yes", "gradient_clip_val": "big",
    }.items():  # fmt: skip
        with pytest.raises(MisconfigurationException, match=name):
            L.Trainer(**{name: value}).strategy.device  # noqa: B018


# ---- self.log


class Logging(Regression):
    """Logs its argument from a step or hook."""

    def __init__(self, hook: str = "training_step", **options: Any) -> None:
        super().__init__()
        self.hook, self.options = hook, options
        if hook != "training_step":
            setattr(self, hook, lambda *args, **kwargs: self.note(1.0))

    def note(self, value: Any) -> None:
        self.log("x", value, **self.options)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.hook == "training_step":
            self.note(float(batch_idx))
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("v", float(batch_idx))


def metrics(model: L.LightningModule, count: int = 10, **kwargs: Any) -> dict[str, float]:
    fit = trainer(log_every_n_steps=1, **kwargs)
    fit.fit(model, loader(count, 4), loader(count, 4))
    return {k: v.item() for k, v in fit.callback_metrics.items()}


def test_log_defaults_by_hook() -> None:
    """Batches of 4, 4 and 2: steps 0, 1, 2; the epoch's mean is weighted by the batch sizes."""
    mean = (4 * 0 + 4 * 1 + 2 * 2) / 10
    assert metrics(Logging())["x"] == 2.0
    assert metrics(Logging())["v"] == pytest.approx(mean)
    both = metrics(Logging(on_step=True, on_epoch=True))
    assert (both["x_step"], both["x_epoch"], both["x"]) == (2.0, pytest.approx(mean), pytest.approx(mean))
    assert metrics(Logging(on_step=False, on_epoch=True))["x"] == pytest.approx(mean)
    assert metrics(Logging(on_step=False, on_epoch=True, batch_size=1))["x"] == pytest.approx(1.0)
    for reduce, expected in {"sum": 3.0, "min": 0.0, "max": 2.0}.items():
        assert metrics(Logging(on_step=False, on_epoch=True, reduce_fx=reduce))["x"] == expected
    for hook in ("on_train_epoch_end", "on_validation_epoch_end", "on_train_start"):
        assert metrics(Logging(hook))["x"] == 1.0


@pytest.mark.parametrize(
    "hook", ["on_fit_start", "on_train_end", "on_validation_end", "setup", "configure_optimizers"]
)
def test_log_is_refused_where_it_has_no_meaning(hook: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"self\.log cannot be called from"):
        metrics(Logging(hook))


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        (
            Logging("on_train_epoch_end", on_step=True),
            MisconfigurationException,
            "no meaning in on_train_epoch_end",
        ),
        (Logging(on_step=False, on_epoch=False), MisconfigurationException, "would log nothing"),
        (Logging(reduce_fx="median"), MisconfigurationException, "median"),
    ],
)
def test_log_refuses_what_makes_no_sense(model: Logging, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        metrics(model)


def test_log_refuses_values_that_are_no_scalars_and_two_meanings_of_one_key() -> None:
    class Odd(Regression):
        values: tuple[tuple[Any, dict[str, Any]], ...] = ()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for value, options in self.values:
                self.log("x", value, **options)
            return self.loss(batch)

    model = Odd()
    for value in (torch.zeros(3), "high", None, [1.0]):
        model.values = ((value, {}),)
        with pytest.raises(ValueError, match="x"):
            trainer().fit(model, loader())
    model.values = ((1.0, {}), (1.0, {"on_epoch": True}))
    with pytest.raises(MisconfigurationException, match="twice with different arguments"):
        trainer().fit(model, loader())


def test_several_validation_loaders_have_keys_of_their_own() -> None:
    class Two(Regression):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("v", float(dataloader_idx))

    fit = trainer()
    fit.fit(Two(), loader(), [loader(), loader()])
    assert fit.validation_metrics == {"v/dataloader_idx_0": 0.0, "v/dataloader_idx_1": 1.0}


REDUCE = """
import json, sys
from tests.trainer.models import Regression, loader, trainer
class Model(Regression):
    def training_step(self, batch, batch_idx):
        rank = float(self.global_rank)
        self.log("step", rank, sync_dist=True)
        for reduce in ("mean", "sum", "min", "max"):
            self.log(reduce, rank + 1, on_step=False, on_epoch=True, reduce_fx=reduce, sync_dist=True)
        return self.loss(batch)
    def validation_step(self, batch, batch_idx):
        self.log("val", float(len(batch[0])), sync_dist=True)
        self.log("seen", float(len(batch[0])), reduce_fx="sum", sync_dist=True)
fit = trainer(log_every_n_steps=1)
fit.fit(Model(), loader(6, 2), loader(1, 2))
print("RESULT", json.dumps({k: v.item() for k, v in fit.callback_metrics.items()}))
"""


def test_sync_dist_reduces_over_ranks_also_when_one_has_no_batch(host: Host, tmp_path: Path) -> None:
    """Training: ranks have 2, 2 and then 1, 1 samples. Validation: one sample in all, so rank 1 logs nothing."""
    script = tmp_path / "reduce.py"
    script.write_text(REDUCE)
    ranks = host.run([str(script)], world=2)
    results = []
    for rank in ranks:
        assert rank.code == 0, rank.output
        (line,) = [x for x in rank.output.splitlines() if x.startswith("RESULT ")]
        results.append(json.loads(line.removeprefix("RESULT ")))
    for result in results:
        assert (result["step"], result["mean"], result["sum"]) == (0.5, 1.5, 6.0)
        assert (result["min"], result["max"]) == (1.0, 2.0)
    assert (results[0]["val"], results[0]["seen"]) == (1.0, 1.0)


# ---- where it goes


def test_csv_logger_writes_rows_as_lightning_numbers_them(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit = trainer(logger=logger, log_every_n_steps=2, max_epochs=2)
    fit.fit(Logging(on_epoch=True), loader(10, 4), loader(10, 4))
    rows = list(csv.DictReader((tmp_path / "lightning_logs/version_0/metrics.csv").open()))
    steps = [(int(r["step"]), float(r["x_step"])) for r in rows if r["x_step"]]
    assert steps == [(1, 1.0), (3, 0.0), (5, 2.0)]
    assert [int(r["step"]) for r in rows if r["v"]] == [2, 5]
    assert CSVLogger(tmp_path).version == 1


def test_a_logger_that_fails_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    fit = trainer(logger=CSVLogger(tmp_path / "file", flush_logs_every_n_steps=1), log_every_n_steps=1)
    fit.fit(Logging(), loader(10, 4))
    assert fit.global_step == 3
    assert "CSVLogger is left out" in caplog.text


def test_progress_is_one_line_per_flush(capsys: pytest.CaptureFixture[str]) -> None:
    fit = trainer(callbacks=ProgressPrinter(), enable_progress_bar=True, log_every_n_steps=2, max_epochs=2)
    fit.fit(Logging(prog_bar=True), loader(16, 4))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split(" x=")[0].split(" loss=")[0] for line in lines] == [
        "epoch 0 step 2/8", "epoch 0 step 4/8", "epoch 1 step 6/8", "epoch 1 step 8/8",
    ]  # fmt: skip
    assert all(" x=" in line and " loss=" in line for line in lines)


# ---- seeds


def draws() -> list[float]:
    return [
        random.random(),
        float(np.random.rand()),
        torch.rand(1).item(),
        random.gauss(0, 1),
        float(np.random.randn()),
    ]


def test_seed_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert L.seed_everything() == 11
    first = draws()
    assert L.seed_everything(11) == 11
    assert draws() == first
    assert "Seed set to 11" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seed"):
        L.seed_everything(-1)


def test_rng_state_restores_every_generator() -> None:
    draws()  # leaves a half-used pair in both Gaussian generators
    state = rng_state()
    first = draws()
    draws()
    set_rng_state(state)
    assert draws() == first
