"""PrometheusLogger: scraped over HTTP on loopback, and read from its textfile by Prometheus' own parser."""

from __future__ import annotations

import math
import pickle
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tests.trainer.loggerparts import RUN_UID
from trainyard.errors import MisconfigurationException
from trainyard.loggers import PrometheusLogger


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (RUN_UID, "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def logger() -> Iterator[PrometheusLogger]:
    made = PrometheusLogger(0, labels={"run": "digits"}, max_metrics=4)
    yield made
    made.close()


def values(text: str) -> dict[str, float]:
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


def scrape(logger: PrometheusLogger) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{logger.port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_scrape(logger: PrometheusLogger) -> None:
    before = threading.active_count()
    assert logger.port is None
    logger.log_metrics({"train/loss": 0.5, "epoch": 0}, 49)
    logger.log_metrics({"train/loss": torch.tensor(0.25), "9 lives": math.inf}, 99)
    text = scrape(logger)
    found = values(text)
    assert found["trainyard_train_loss"] == 0.25
    assert found["trainyard_9_lives"] == math.inf
    assert (found["trainyard_step"], found["trainyard_epoch"], found["trainyard_metrics_dropped"]) == (
        99,
        0,
        0,
    )
    assert found["trainyard_last_flush_timestamp_seconds"] > 1e9
    assert 'trainyard_train_loss{run="digits"} 0.25' in text
    assert "# HELP trainyard_train_loss Logged as train/loss." in text
    logger.finalize("success")
    assert values(scrape(logger))["trainyard_train_loss"] == 0.25  # the last values can still be scraped
    logger.finalize("failed")
    assert threading.active_count() == before
    logger.log_metrics({"train/loss": 1.0}, 0)
    assert values(scrape(logger))["trainyard_train_loss"] == 1.0


def test_names_that_clash_get_numbers_and_there_are_not_too_many(
    logger: PrometheusLogger, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        logger.log_metrics(
            {"val/loss": 1.0, "val_loss": 2.0, "step": 3.0, **{f"x{number}{i}": 0 for i in range(3)}}, 7
        )
    found = values(scrape(logger))
    assert (found["trainyard_val_loss"], found["trainyard_val_loss_2"], found["trainyard_step_2"]) == (
        1,
        2,
        3,
    )
    assert found["trainyard_step"] == 7
    assert found["trainyard_x00"] == 0
    assert "trainyard_x01" not in found
    assert found["trainyard_metrics_dropped"] == 8
    assert caplog.text.count("is left out, and all further names") == 1


def test_textfile(tmp_path: Path) -> None:
    path = tmp_path / "node/train.prom"
    logger = PrometheusLogger(textfile=path, namespace="ours", prefix="gan")
    assert not path.parent.exists()
    logger.log_metrics({"loss": 0.5}, 1)
    assert values(path.read_text())["ours_gan_loss"] == 0.5
    logger.finalize("success")
    assert [p.name for p in path.parent.iterdir()] == ["train.prom"]
    logger.close()


@pytest.mark.parametrize("given", [None, CollectorRegistry()])
def test_registry(given: Any) -> None:
    registry = REGISTRY if given is None else given
    logger = PrometheusLogger(registry=given)
    logger.log_metrics({"only here": 3.0}, 1)
    assert logger.experiment is registry
    assert registry.get_sample_value("trainyard_only_here") == 3.0
    logger.close()
    assert registry.get_sample_value("trainyard_only_here") is None


def test_other_ranks_serve_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    before = threading.active_count()
    logger = PrometheusLogger(0)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    logger.close()
    assert logger.port is None
    assert threading.active_count() == before


def test_a_taken_port_raises(logger: PrometheusLogger) -> None:
    logger.log_metrics({"loss": 1.0}, 0)
    other = PrometheusLogger(logger.port)
    with pytest.raises(OSError, match="Address already in use"):
        other.log_metrics({"loss": 1.0}, 0)


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PrometheusLogger(1)._addr == "127.0.0.1"
    monkeypatch.setenv(RUN_UID, "uid")
    assert PrometheusLogger(1)._addr == "0.0.0.0"  # noqa: S104
    for wrong in ({"namespace": "a-b"}, {"textfile": "x.txt"}, {"labels": {"a b": "c"}}):
        with pytest.raises(MisconfigurationException, match=next(iter(wrong))):
            PrometheusLogger(**wrong)  # type: ignore[arg-type]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "prometheus_client", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'trainyard\[prometheus\]'"):
            PrometheusLogger()


def test_it_can_be_pickled_after_use(logger: PrometheusLogger) -> None:
    logger.log_metrics({"loss": 1.0}, 0)
    again = pickle.loads(pickle.dumps(logger))  # noqa: S301 - our own bytes
    again.log_metrics({"loss": 2.0}, 0)
    assert values(scrape(again))["trainyard_loss"] == 2.0
    again.close()
