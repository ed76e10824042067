"""CometLogger with the real SDK offline: its archives are read back message by message."""

from __future__ import annotations

import json
import pickle
import socket
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.loggerparts import Saver, new_attempt, quiet
from trainyard.loggers import CometLogger, comet

NO_LOOKING_AROUND = {
    "log_code": False, "log_env_details": False, "log_git_metadata": False, "log_git_patch": False,
    "display_summary_level": 0, "auto_output_logging": False, "parse_args": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quiet(monkeypatch, tmp_path / "sdk")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield
    import comet_ml

    if (running := comet_ml.get_running_experiment()) is not None:
        running.end()


def made(folder: Path, **kwargs: Any) -> CometLogger:
    return CometLogger(**{"online": False, "offline_directory": str(folder), **NO_LOOKING_AROUND, **kwargs})


def archives(folder: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(experiment, messages) of each, the oldest first."""
    found = []
    for path in sorted(folder.glob("*.zip"), key=lambda p: p.stat().st_mtime_ns):
        with zipfile.ZipFile(path) as file:
            lines = file.read("messages.json").decode().splitlines()
            found.append((json.loads(file.read("experiment.json")), [json.loads(line) for line in lines]))
    return found


def metrics(folder: Path) -> list[tuple[str, int | None, float]]:
    return [
        (m["payload"]["metric"]["metricName"], m["payload"]["metric"]["step"], m["payload"]["metric"]["metricValue"])
        for _, messages in archives(folder)
        for m in messages
        if m["type"] == "metric_msg" and "process duration" not in m["payload"]["metric"]["metricName"]
    ]  # fmt: skip


def of_type(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [m["payload"] for _, messages in archives(folder) for m in messages if m["type"] == kind]


def test_metrics_hyperparameters_and_graph(tmp_path: Path) -> None:
    logger = made(tmp_path, project="digits", workspace="team", name="first", tags=["a"], prefix="p")
    assert list(tmp_path.iterdir()) == []
    key = logger.version
    assert key is not None
    assert (logger.name, logger.save_dir) == ("digits", str(tmp_path))
    logger.log_hyperparams({"lr": 0.1, "net": {"act": torch.nn.ReLU}})
    logger.log_graph(torch.nn.Linear(3, 2))
    logger.log_metrics({"loss": torch.tensor(0.5), "epoch": 2}, 49)
    logger.finalize("success")
    logger.log_metrics({"loss": 0.25}, 99)  # a script may go on after fit
    logger.close()
    [(experiment, messages)] = archives(tmp_path)
    assert (experiment["offline_id"], experiment["project_name"]) == (key, "digits")
    assert (experiment["workspace"], experiment["tags"]) == ("team", ["a"])
    assert metrics(tmp_path) == [("p_loss", 49, 0.5), ("p_loss", 99, 0.25)]
    values = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    assert values[0]["epoch"] == 2
    parameters = {
        p["param"]["paramName"]: p["param"]["paramValue"] for p in of_type(tmp_path, "parameter_msg")
    }
    assert parameters["lr"] == 0.1
    assert parameters["net/act"] == "torch.nn.modules.activation.ReLU"
    assert "Linear(in_features=3" in of_type(tmp_path, "graph")[0]["graph"]
    assert logger.version == key


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    logger = made(tmp_path)
    assert logger.version is None
    logger.load_state_dict({"experiment_key": "k" * 32})
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_hyperparams({"a": 1})
    logger.experiment.log_image(None)
    logger.finalize("success")
    assert logger.version == "k" * 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("log_model", "expected"),
    [(False, []), (True, ["epoch=1", "epoch=2", "last"]), ("all", ["epoch=0", "last"] * 2)],
)
def test_checkpoints_are_kept_as_models(tmp_path: Path, log_model: Any, expected: list[str]) -> None:
    logger, saver = made(tmp_path / "archives", log_model=log_model), Saver(tmp_path / "ckpt")
    logger.log_metrics({"loss": 1.0}, 0)
    saver.save([logger], 0, 0.9)
    if log_model == "all":
        saver.save([logger], 0, 0.8)
    else:
        saver.save([logger], 1, 0.5)
        saver.save([logger], 2, 0.7)
    logger.finalize("success")
    logger.close()
    uploads = [
        u for u in of_type(tmp_path / "archives", "file_upload") if u["upload_type"] == "model-element"
    ]
    assert [u["additional_params"]["groupingName"] for u in uploads] == expected
    if log_model is True:
        best = uploads[0]
        assert best["metadata"]["score"] == 0.5
        assert best["metadata"]["aliases"] == ["latest", "best"]
        with zipfile.ZipFile(next((tmp_path / "archives").glob("*.zip"))) as file:
            assert file.read(best["file_path"]) == b"weights of epoch 1"


@pytest.mark.parametrize("known", ["from the checkpoint", "from the TrainingRun", "by the script"])
def test_a_resumed_process_goes_on_with_the_same_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    if known == "from the TrainingRun":
        new_attempt(monkeypatch)
    first = made(tmp_path, mode=None if known == "by the script" else "create")
    first.resume(0)
    first.log_metrics({"loss": 1.0}, 0)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    if known == "from the TrainingRun":
        new_attempt(monkeypatch)
    script = {"experiment_key": first.version} if known == "by the script" else {"mode": "create"}
    second = made(tmp_path, **script)
    if known == "from the checkpoint":
        second.load_state_dict(state)
    second.resume(1)
    second.log_metrics({"loss": 2.0}, 1)
    second.close()
    assert second.version == first.version
    found = [experiment for experiment, _ in archives(tmp_path)]
    assert [e["offline_id"] for e in found] == [first.version] * 2
    assert found[1]["resume_strategy"] == "get_or_create"
    assert metrics(tmp_path) == [("loss", 0, 1.0), ("loss", 1, 2.0)]


def test_failure_ends_the_experiment_with_its_archive(tmp_path: Path) -> None:
    logger = made(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("failed")
    assert metrics(tmp_path) == [("loss", 0, 1.0)]
    logger.log_metrics({"loss": 2.0}, 1)
    logger.close()
    assert metrics(tmp_path) == [("loss", 0, 1.0), ("loss", 1, 2.0)]
    assert {e["offline_id"] for e, _ in archives(tmp_path)} == {logger.version}


def test_it_can_be_pickled_after_use(tmp_path: Path) -> None:
    logger = made(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    again = pickle.loads(pickle.dumps(logger))  # noqa: S301 - our own bytes
    assert again.version == logger.version
    logger.close()


def test_a_server_that_is_away_makes_it_an_offline_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as silent:  # takes connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("COMET_URL_OVERRIDE", f"http://127.0.0.1:{silent.getsockname()[1]}/clientlib/")
        monkeypatch.setenv("COMET_API_KEY", "x" * 25)
        monkeypatch.setattr(comet, "CONNECT_SECONDS", 0.5)
        logger = made(tmp_path, online=True)
        logger.log_metrics({"loss": 1.0}, 0)
        logger.close()
    assert "Comet cannot be reached (TimeoutError)" in caplog.text
    assert metrics(tmp_path) == [("loss", 0, 1.0)]


def test_arguments_of_older_versions_and_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = CometLogger(project_name="p", experiment_name="n", save_dir=str(tmp_path), offline=True)
    assert (old.name, old.save_dir) == ("p", str(tmp_path))
    assert (old._online, old._kwargs["name"]) == (False, "n")
    monkeypatch.setenv("COMET_EXPERIMENT_KEY", "e" * 32)
    chosen = CometLogger()
    chosen.load_state_dict({"experiment_key": "f" * 32})
    assert chosen.version == "e" * 32
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "comet_ml", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'trainyard\[comet\]'"):
            CometLogger()
