"""MLFlowLogger with the real SDK: on a SQLite database read back by MlflowClient, and on servers that fail."""

from __future__ import annotations

import json
import logging
import pickle
import socket
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.trainer.loggerparts import RUN_UID, Saver, new_attempt, quiet
from trainyard.errors import MisconfigurationException
from trainyard.loggers import MLFlowLogger, mlflow


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: the tables take MLflow seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path) -> Path:
    """A folder with the tables."""
    quiet(monkeypatch, tmp_path / "sdk")
    folder = tmp_path / "mlruns"
    folder.mkdir()
    with sqlite3.connect(empty_database) as source, sqlite3.connect(folder / "mlflow.db") as copy:
        source.backup(copy)
    return folder


def client(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def history(folder: Path, run_id: str | None, key: str) -> list[tuple[int, float]]:
    found = client(folder).get_metric_history(run_id, key)
    return sorted((m.step, m.value) for m in found)


def test_defaults_are_a_database_beside_its_artifacts(tmp_path: Path, sdk: Path) -> None:
    logger = MLFlowLogger("digits", run_name="first", save_dir=sdk, tags={"team": "a", "n": 3}, prefix="p")
    assert list(sdk.iterdir()) == [sdk / "mlflow.db"]
    logger.log_hyperparams({"lr": 0.1, "net": {"act": torch.nn.ReLU, "size (px)": 8}, "long": "x" * 9000})
    logger.log_metrics({"loss": torch.tensor(0.5), "val/acc@1": 1, "epoch": 0}, 49)
    logger.log_metrics({"loss": 0.25}, 99)
    logger.finalize("success")
    run = client(sdk).get_run(logger.run_id)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert (run.data.tags["team"], run.data.tags["n"]) == ("a", "3")
    assert run.data.params["lr"] == "0.1"
    assert run.data.params["net/act"] == "torch.nn.modules.activation.ReLU"
    assert run.data.params["net/size _px_"] == "8"
    assert len(run.data.params["long"]) == 6000
    assert run.data.metrics == {"p-loss": 0.25, "p-val/acc_1": 1.0, "p-epoch": 0.0}
    assert history(sdk, logger.run_id, "p-loss") == [(49, 0.5), (99, 0.25)]
    experiment = client(sdk).get_experiment_by_name("digits")
    assert (logger.name, logger.version) == (experiment.experiment_id, run.info.run_id)
    assert logger.save_dir == str(sdk)
    assert experiment.artifact_location == (sdk / "artifacts").as_uri()
    again = MLFlowLogger("digits", save_dir=sdk)
    assert again.experiment_id == logger.experiment_id
    assert again.run_id != logger.run_id


def test_nothing_happens_before_the_first_use_or_on_other_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new"
    MLFlowLogger(save_dir=folder)
    monkeypatch.setenv("RANK", "1")
    other = MLFlowLogger(save_dir=folder)
    assert other.version is None
    other.load_state_dict({"run_id": "abc", "experiment_id": "7"})
    other.log_metrics({"loss": 1.0}, 0)
    other.log_hyperparams({"a": 1})
    other.experiment.log_artifact("x")
    other.finalize("success")
    assert (other.name, other.version) == ("7", "abc")
    assert not folder.exists()


@pytest.mark.parametrize("synchronous", [None, False])
def test_many_metrics_and_parameters_go_in_batches(sdk: Path, synchronous: bool | None) -> None:
    logger = MLFlowLogger(save_dir=sdk, synchronous=synchronous)
    logger.log_hyperparams({f"p{i}": i for i in range(150)})
    logger.log_metrics({f"m{i}": i for i in range(1200)}, 0)
    logger.finalize("success")
    run = client(sdk).get_run(logger.run_id)
    assert len(run.data.params) == 150
    assert len(run.data.metrics) == 1200


def test_what_is_no_metric(sdk: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = MLFlowLogger(save_dir=sdk)
    logger.log_metrics({"note": "text", "loss": 1.0}, 0)  # type: ignore[dict-item]
    assert "the text note='text' is no metric" in caplog.text
    assert history(sdk, logger.run_id, "loss") == [(0, 1.0)]
    with pytest.raises(ValueError, match="is no scalar"):
        logger.log_metrics({"loss": torch.zeros(2)}, 1)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("log_model", "top_k", "at_once", "at_end"),
    [
        (False, 2, set(), set()),
        (True, 2, set(), {"epoch=1", "epoch=2", "last"}),
        (True, -1, {"epoch=0", "epoch=1", "epoch=2", "last"}, {"epoch=0", "epoch=1", "epoch=2", "last"}),
        ("all", 2, {"epoch=0", "epoch=1", "epoch=2", "last"}, {"epoch=0", "epoch=1", "epoch=2", "last"}),
    ],
)
def test_checkpoints_become_artifacts(
    tmp_path: Path, sdk: Path, log_model: Any, top_k: int, at_once: set[str], at_end: set[str]
) -> None:
    logger, saver = MLFlowLogger(save_dir=sdk, log_model=log_model), Saver(tmp_path / "ckpt", top_k)
    for epoch, score in enumerate((0.9, 0.5, 0.7)):
        saver.save([logger], epoch, score)

    def stored() -> set[str]:
        found = client(sdk).list_artifacts(logger.run_id, "model/checkpoints")
        return {Path(f.path).name for f in found}

    assert stored() == at_once
    logger.finalize("success")
    assert stored() == at_end
    if at_end:
        best = Path(client(sdk).download_artifacts(logger.run_id, "model/checkpoints/epoch=1"))
        assert (best / "epoch=1.ckpt").read_text() == "weights of epoch 1"
        metadata = yaml.safe_load((best / "metadata.yaml").read_text())
        assert metadata["score"] == 0.5
        assert metadata["ModelCheckpoint"] == {
            "monitor": "val_loss", "mode": "min", "save_last": True, "save_top_k": top_k, "save_weights_only": False,
        }  # fmt: skip
        assert (best / "aliases.txt").read_text() == "['latest', 'best']"


def test_a_checkpoint_of_shards_is_a_folder(tmp_path: Path, sdk: Path) -> None:
    logger, saver = MLFlowLogger(save_dir=sdk, log_model="all"), Saver(tmp_path / "ckpt")
    shards = tmp_path / "ckpt/sharded.ckpt"
    shards.mkdir()
    (shards / "__0_0.distcp").write_text("0")
    saver.best_model_path, saver.best_model_score = str(shards), torch.tensor(0.1)
    logger.after_save_checkpoint(saver)  # type: ignore[arg-type]
    found = client(sdk).list_artifacts(logger.run_id, "model/checkpoints/sharded/sharded.ckpt")
    assert [Path(f.path).name for f in found] == ["__0_0.distcp"]


@pytest.mark.parametrize("known", ["from the checkpoint", "from the TrainingRun", "by the script"])
def test_a_resumed_process_goes_on_with_the_same_run(
    sdk: Path, monkeypatch: pytest.MonkeyPatch, known: str, caplog: pytest.LogCaptureFixture
) -> None:
    if known == "from the TrainingRun":
        new_attempt(monkeypatch)
    first = MLFlowLogger(save_dir=sdk)
    first.resume(0)
    first.log_hyperparams({"lr": 0.1, "host": "a"})
    for step in range(5):
        first.log_metrics({"loss": float(step)}, step)
    state = json.loads(json.dumps(first.state_dict()))  # the checkpoint is of step 3
    first.log_metrics({"val": 1.0}, 4)  # killed without an end

    if known == "from the TrainingRun":
        new_attempt(monkeypatch)
    second = MLFlowLogger(save_dir=sdk, run_id=first.run_id if known == "by the script" else None)
    if known == "from the checkpoint":
        second.load_state_dict(state)
    second.resume(3)
    second.log_hyperparams({"lr": 0.1, "host": "b"})
    for step in range(3, 7):
        second.log_metrics({"loss": float(step)}, step)
    second.log_metrics({"val": 2.0}, 6)
    second.finalize("success")
    assert second.run_id == first.run_id
    assert history(sdk, first.run_id, "loss") == [(step, float(step)) for step in range(7)]
    assert history(sdk, first.run_id, "val") == [(4, 1.0), (6, 2.0)]
    assert "MLflow cannot change that to b" in caplog.text
    runs = client(sdk).search_runs([second.experiment_id])
    assert [(r.info.run_id, r.info.status) for r in runs] == [(first.run_id, "FINISHED")]
    if known == "from the TrainingRun":
        assert RUN_UID.lower() not in runs[0].data.tags
        new_attempt(monkeypatch, "another")
        assert MLFlowLogger(save_dir=sdk).run_id != first.run_id


def test_statuses(sdk: Path) -> None:
    for status, expected in (("failed", "FAILED"), ("interrupted", "KILLED"), ("success", "FINISHED")):
        logger = MLFlowLogger(save_dir=sdk)
        logger.log_metrics({"loss": 1.0}, 0)
        logger.finalize(status)
        assert client(sdk).get_run(logger.run_id).info.status == expected


def test_it_can_be_pickled_after_use(sdk: Path) -> None:
    logger = MLFlowLogger(save_dir=sdk)
    run_id = logger.run_id
    again = pickle.loads(pickle.dumps(logger))  # noqa: S301 - our own bytes
    assert again.run_id == run_id
    again.log_metrics({"loss": 1.0}, 0)
    assert history(sdk, run_id, "loss") == [(0, 1.0)]


def test_a_server_that_is_away_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow would try for minutes."""
    with socket.socket() as silent:  # takes connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        logger = MLFlowLogger(tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(mlflow, "CONNECT_SECONDS", 0.2)
        with pytest.raises(TimeoutError, match=r"MLflow at http://127.0.0.1:\d+ gave no answer within 0.2 s"):
            logger.log_metrics({"loss": 1.0}, 0)
        assert logger.save_dir is None


class Flaky(BaseHTTPRequestHandler):
    """As much of MLflow's REST API as a run takes; `down` refuses metrics."""

    down = False
    received: list[dict[str, Any]] = []  # noqa: RUF012 - one server at a time

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        answer: dict[str, Any] = {}
        if "get-by-name" in self.path:
            answer = {"experiment": {"experiment_id": "1", "name": "x"}}
        elif "runs/create" in self.path:
            answer = {"run": {"info": {"run_id": "r1", "experiment_id": "1"}, "data": {}}}
        elif "log-batch" in self.path:
            if Flaky.down:
                self.send_response(403)
                self.end_headers()
                return
            Flaky.received += body["metrics"]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def flaky() -> Iterator[str]:
    Flaky.down, Flaky.received = False, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_metrics_of_an_outage_are_kept_and_sent_later(
    flaky: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow, "_PAUSE_SECONDS", 3600.0)
    logger = MLFlowLogger(tracking_uri=flaky)
    logger.log_metrics({"loss": 0.0}, 0)
    Flaky.down = True
    for step in range(1, 4):
        logger.log_metrics({"loss": float(step)}, step)
    assert logger.state_dict() == {"run_id": "r1", "experiment_id": "1"}
    warned = [
        r for r in caplog.records if r.levelno == logging.WARNING and "MLflow cannot be reached" in r.message
    ]
    assert len(warned) == 1
    assert [m["step"] for m in Flaky.received] == [0]
    Flaky.down = False
    logger.log_metrics({"loss": 4.0}, 4)
    assert [m["step"] for m in Flaky.received] == [0], "the server was asked again at once"
    logger._next_try = 1e-9  # the pause is over
    logger.log_metrics({"loss": 5.0}, 5)
    assert [m["step"] for m in Flaky.received] == list(range(6))


def test_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.invalid")
    assert MLFlowLogger().save_dir is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(MisconfigurationException, match="save_dir: give one, or a tracking_uri"):
        MLFlowLogger(save_dir=None)
    with monkeypatch.context() as without:
        without.setitem(__import__("sys").modules, "mlflow", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'trainyard\[mlflow\]'"):
            MLFlowLogger()
