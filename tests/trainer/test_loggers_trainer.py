"""Loggers in fits: what they are told, what a killed and restarted fit leaves behind, and that they stop nobody."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.loggerparts import RUN_UID, quiet
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks.model_checkpoint import ModelCheckpoint
from trainyard.loggers import CSVLogger, MLFlowLogger, PrometheusLogger, TensorBoardLogger


@pytest.fixture(autouse=True)
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch, tmp_path / "sdk")


class Net(Regression):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def scalars(folder: str | None, tag: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return [e.step for e in found.Scalars(tag)]


def test_loggers_side_by_side_get_all_of_a_fit(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    board = TensorBoardLogger(tmp_path, log_graph=True)
    mlflow = MLFlowLogger(save_dir=tmp_path / "mlflow", log_model=True)
    prometheus = PrometheusLogger(textfile=tmp_path / "train.prom")
    fit = trainer(
        logger=[board, CSVLogger(tmp_path, "csv"), mlflow, prometheus], max_epochs=2, log_every_n_steps=1,
        callbacks=[ModelCheckpoint(monitor="val_loss")], enable_checkpointing=True,
    )  # fmt: skip
    fit.fit(Net(0.05), loader(), loader())
    assert scalars(board.log_dir, "loss") == list(range(6))
    assert scalars(board.log_dir, "val_loss") == [2, 5]
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db").get_run(mlflow.run_id)
    assert (run.info.status, run.data.params["lr"]) == ("FINISHED", "0.05")
    stored = mlflow.experiment.list_artifacts(mlflow.run_id, "model/checkpoints")
    best = Path(fit.checkpoint_callback.best_model_path)
    assert [Path(f.path).name for f in stored] == [best.stem]
    assert best.parent == Path(str(board.log_dir), "checkpoints")
    assert "trainyard_val_loss" in (tmp_path / "train.prom").read_text()
    prometheus.close()


def test_loggers_that_fail_stop_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose folder cannot be made, one whose server is away, and one that is well."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "file").write_text("")
    well = CSVLogger(tmp_path)
    fit = trainer(
        logger=[CSVLogger(tmp_path / "file"), MLFlowLogger(tracking_uri="http://127.0.0.1:9"), well],
        max_epochs=1, log_every_n_steps=1,
    )  # fmt: skip
    fit.fit(Net(), loader())
    assert fit.global_step == 3
    assert "CSVLogger is left out from now on: NotADirectoryError" in caplog.text
    assert "MLFlowLogger is left out from now on" in caplog.text
    with Path(well.log_dir, "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]


SCRIPT = """if True:
    import os, signal, sys
    import trainyard as L
    from tests.trainer.models import loader
    from tests.trainer.test_loggers_trainer import Net
    from trainyard.callbacks.model_checkpoint import ModelCheckpoint
    from trainyard.loggers import CSVLogger, TensorBoardLogger, WandbLogger

    folder, kill_at = sys.argv[1], int(sys.argv[2])

    class Killer(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == kill_at:
                for logger in trainer.loggers:
                    logger.save()  # the worst case: what was logged after the checkpoint is on disk
                os.kill(os.getpid(), signal.SIGKILL)

    loggers = [TensorBoardLogger(folder), CSVLogger(folder, "csv")]
    if "wandb" in sys.argv:
        loggers.append(WandbLogger(save_dir=folder))
    fit = L.Trainer(
        logger=loggers, max_epochs=4, log_every_n_steps=1, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Killer(), ModelCheckpoint(save_last=True)],
        checkpoint=L.CheckpointConfig(uri=f"file://{folder}/state", every_n_steps=2, run="r"),
    )
    fit.fit(Net(), loader(shuffle=True), loader())
"""


def run_script(
    folder: Path, kill_at: int, run_uid: str | None, *more: str
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    if run_uid is not None:
        env[RUN_UID] = run_uid
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(kill_at), *more], env=env, timeout=120, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("run_uid", "kill_at", "more"), [(None, 8, ["wandb"]), ("uid-5", 1, [])])
def test_a_killed_fit_that_is_started_again_leaves_one_run_in_each(
    tmp_path: Path, run_uid: str | None, kill_at: int, more: list[str]
) -> None:
    """On a laptop, where the checkpoint says which run it is, and in a TrainingRun before its first checkpoint."""
    done = run_script(tmp_path, kill_at, run_uid, *more)
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = run_script(tmp_path, -1, run_uid, *more)
    assert done.returncode == 0, done.stderr

    folder = tmp_path / "lightning_logs/version_0"
    assert [p.name for p in folder.parent.iterdir()] == ["version_0"]
    assert (folder / "checkpoints/last.ckpt").exists()
    assert scalars(str(folder), "loss") == list(range(12))
    assert scalars(str(folder), "val_loss") == [2, 5, 8, 11]
    assert [p.name for p in (tmp_path / "csv").iterdir()] == ["version_0"]
    with (tmp_path / "csv/version_0/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows if r["loss"]] == list(range(12))
    assert [int(r["step"]) for r in rows if r["val_loss"]] == [2, 5, 8, 11]
    if more:
        attempts = [p.name.rpartition("-")[2] for p in (tmp_path / "wandb").glob("offline-run-*")]
        assert len(attempts) == 2
        assert len(set(attempts)) == 1, "a second W&B run"
