"""What the trainer does with its loggers: agree between ranks, take up a run, say it to checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.trainer.loggerparts import RUN_UID
from trainyard.errors import MisconfigurationException
from trainyard.loggers import CSVLogger, DummyLogger, TensorBoardLogger
from trainyard.loggers.session import begin, initial_hparams, states
from trainyard.peers import Alone


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (RUN_UID, "RANK"):
        monkeypatch.delenv(name, raising=False)


class Second(Alone):
    """Rank 1, that hears what rank 0 said."""

    rank, world = 1, 2

    def __init__(self, heard: Any) -> None:
        self.heard = heard

    def broadcast(self, value: Any) -> Any:
        return json.loads(json.dumps(self.heard))


class First(Alone):
    rank, world = 0, 2
    said: Any = None

    def broadcast(self, value: Any) -> Any:
        self.said = value
        return value


class Broken(CSVLogger):
    """As one whose disk is full."""

    def state_dict(self) -> dict[str, Any]:
        raise OSError("no space left on device")


def test_ranks_agree_on_versions_and_on_who_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def script() -> list[Any]:
        return [
            CSVLogger(tmp_path / "a"),
            Broken(tmp_path / "b"),
            TensorBoardLogger(tmp_path / "c"),
            DummyLogger(),
        ]

    (tmp_path / "c/lightning_logs/version_4").mkdir(parents=True)
    first = First()
    kept = begin(script(), first, step=0)
    assert [type(logger) for logger in kept] == [CSVLogger, TensorBoardLogger, DummyLogger]
    assert "Broken is left out from now on: OSError: no space left on device" in caplog.text
    kept[1].log_metrics({"loss": 1.0}, 0)  # rank 0 is ahead: version_5 is there when the others look
    kept[1].finalize("success")

    monkeypatch.setenv("RANK", "1")
    others = begin(script(), Second(first.said), step=0)
    assert [type(logger) for logger in others] == [CSVLogger, TensorBoardLogger, DummyLogger]
    assert [logger.log_dir for logger in others] == [logger.log_dir for logger in kept]
    assert others[1].version == 5


def test_a_restart_takes_up_each_loggers_own_run(tmp_path: Path) -> None:
    def script() -> list[Any]:
        return [
            Broken(tmp_path),
            CSVLogger(tmp_path),
            CSVLogger(tmp_path, version=9),
            CSVLogger(tmp_path, "other"),
        ]

    loggers = script()
    kept = begin(loggers, Alone(), step=0)
    for logger in kept:
        for step in range(4):
            logger.log_metrics({"loss": 1.0}, step)
    checkpoint = json.loads(json.dumps(states(loggers)))
    assert checkpoint[0] == {}
    assert [entry["state"]["version"] for entry in checkpoint[1:]] == [0, 9, 0]

    again = begin(script(), Alone(), saved=checkpoint, step=2)
    assert [logger.version for logger in again] == [0, 9, 0]
    for logger in again:
        logger.log_metrics({"loss": 2.0}, 2)
        logger.finalize("success")
        lines = Path(str(logger.log_dir), "metrics.csv").read_text().split()
        assert lines == ["loss,step", "1.0,0", "1.0,1", "2.0,2"]

    fresh = begin(script(), Alone(), step=2)  # somebody's checkpoint, a new run
    assert fresh[0].version == 10
    changed = begin([TensorBoardLogger(tmp_path, "x")] * 4, Alone(), saved=checkpoint, step=2)
    assert changed[1].version == 0


def test_states_hold_what_was_logged_before_them(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    assert not Path(logger.log_dir, "metrics.csv").exists()
    states([logger])
    assert Path(logger.log_dir, "metrics.csv").read_text().split() == ["loss,step", "1.0,0"]


def owner(hparams: Any, *, log: bool = True) -> Any:
    return SimpleNamespace(hparams_initial=hparams, _log_hyperparams=log)


def test_hyperparameters_of_module_and_data_module() -> None:
    assert initial_hparams(SimpleNamespace()) is None
    assert initial_hparams(owner({"a": 1}, log=False)) is None
    same = torch.zeros(3)
    merged = initial_hparams(owner({"a": 1, "t": same}), owner({"a": 1, "t": same, "b": 2}))
    assert merged == {"a": 1, "t": same, "b": 2}
    with pytest.raises(MisconfigurationException, match="different values for a, t; rename one"):
        initial_hparams(owner({"a": 1, "t": same}), owner({"a": 1.0, "t": torch.zeros(3)}))
