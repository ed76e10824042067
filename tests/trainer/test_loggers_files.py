"""Loggers that write files: CSV and TensorBoard, read back as their users read them."""

from __future__ import annotations

import csv
import json
import pickle
import subprocess
import sys
import threading
from argparse import Namespace
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.trainer.loggerparts import RUN_UID, new_attempt
from trainyard.errors import MisconfigurationException
from trainyard.loggers import CSVLogger, DummyLogger, Logger, TensorBoardLogger, default_logger
from trainyard.loggers.csv_logs import ExperimentWriter


@pytest.fixture(autouse=True)
def outside_of_a_training_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (RUN_UID, "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=[CSVLogger, TensorBoardLogger])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def events(folder: str | Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def scalars(folder: str | Path, tag: str) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in events(folder).Scalars(tag)]


# ---- both


def test_construction_writes_nothing_and_starts_nothing(tmp_path: Path, kind: Any) -> None:
    before = threading.active_count()
    logger = kind(tmp_path / "logs", "model")
    assert (logger.name, logger.version) == ("model", 0)
    assert logger.log_dir == str(tmp_path / "logs/model/version_0")
    assert logger.root_dir == str(tmp_path / "logs/model")
    assert logger.save_dir == str(tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
    assert threading.active_count() == before


def test_constructing_loggers_imports_no_sdk(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from trainyard.loggers import (
            CSVLogger, CometLogger, MLFlowLogger, PrometheusLogger, TensorBoardLogger, WandbLogger
        )
        CSVLogger("x"), TensorBoardLogger("x"), WandbLogger(), MLFlowLogger(), CometLogger(), PrometheusLogger(0)
        heavy = {"torch", "tensorboard", "wandb", "mlflow", "comet_ml", "prometheus_client"}
        print(sorted(heavy & set(sys.modules)), __import__("threading").active_count(), __import__("os").listdir())
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout == "[] 1 []\n", done.stderr


def test_versions_count_up_and_take_names(tmp_path: Path, kind: Any) -> None:
    for expected in (0, 1):
        logger = kind(tmp_path)
        logger.log_metrics({"loss": 1.0}, 0)
        logger.finalize("success")
        assert logger.version == expected
    (tmp_path / "lightning_logs/version_7").mkdir()
    (tmp_path / "lightning_logs/version_x").mkdir()
    assert kind(tmp_path).version == 8
    assert kind(tmp_path, version="mine").log_dir == str(tmp_path / "lightning_logs/mine")
    assert kind(tmp_path, version=3).log_dir == str(tmp_path / "lightning_logs/version_3")
    assert kind(tmp_path, name=None).log_dir == str(tmp_path / "version_0")


def test_a_url_is_refused(kind: Any) -> None:
    with pytest.raises(MisconfigurationException, match="save_dir: s3://bucket/logs is a URL"):
        kind("s3://bucket/logs")


class Mode(Enum):
    FAST = 3


@dataclass
class Inner:
    depth: int = 2


def test_hyperparameters_are_a_yaml_file(tmp_path: Path, kind: Any) -> None:
    logger = kind(tmp_path)
    params = {
        "lr": 1e-5, "big": 1e22, "none": None, "yes": "no", "text": "a: b # c\n'\"", "flag": True, "inf": float("-inf"),
        "nested": {"layers": [8, [16, 32]], "empty": {}, "nothing": []}, "tensor": torch.tensor(2.5), "mode": Mode.FAST,
        "inner": Inner(), "act": torch.nn.ReLU, "path": Path("/x/y"), "number text": "12", "one": "1e5",
    }  # fmt: skip
    logger.log_hyperparams(params)
    logger.log_hyperparams(Namespace(seed=7))
    logger.save()
    assert yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text()) == {
        **params, "tensor": 2.5, "mode": "FAST", "inner": {"depth": 2}, "path": "/x/y", "seed": 7,
        "act": "torch.nn.modules.activation.ReLU",
    }  # fmt: skip
    logger.finalize("success")


def test_other_ranks_write_nothing(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    logger = kind(tmp_path)
    logger.load_state_dict({"version": 4})
    logger.log_hyperparams({"a": 1})
    logger.log_metrics({"loss": 1.0}, 0)
    logger.experiment.add_image("x", 3, dataformats="HW")
    logger.experiment.config.update({"a": 1})
    logger.experiment.anything["index"].more()["x"] = 3
    assert list(logger.experiment.tags) == []
    logger.save()
    logger.finalize("success")
    assert logger.log_dir == str(tmp_path / "lightning_logs/version_4")
    assert list(tmp_path.iterdir()) == []


def test_it_can_be_pickled_after_use(tmp_path: Path, kind: Any) -> None:
    logger = kind(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    again = pickle.loads(pickle.dumps(logger))  # noqa: S301 - our own bytes
    assert again.log_dir == logger.log_dir
    logger.finalize("success")


def test_a_resumed_process_goes_on_in_the_same_version_and_logs_no_step_twice(
    tmp_path: Path, kind: Any
) -> None:
    first = kind(tmp_path)
    first.resume(0)
    for step in range(5):
        first.log_metrics({"loss": float(step)}, step)
    state = json.loads(
        json.dumps(first.state_dict())
    )  # the checkpoint at step 5; then it goes on, and is killed
    for step in range(5, 8):
        first.log_metrics({"loss": 100.0 + step, "extra": 1.0}, step)
    first.save()

    second = kind(tmp_path)
    second.load_state_dict(state)
    second.resume(5)
    for step in range(5, 10):
        second.log_metrics({"loss": float(step)}, step)
    second.finalize("success")
    expected = [(step, float(step)) for step in range(10)]
    assert second.version == 0
    if kind is CSVLogger:
        assert [(int(r["step"]), float(r["loss"])) for r in rows(second)] == expected
    else:
        assert scalars(second.log_dir, "loss") == expected
    assert [p.name for p in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
    first.close()


def test_an_attempt_without_a_checkpoint_finds_its_version_again(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loggers of the same place, as a script with two trainers has them; another run gets versions of its own."""
    for attempt in range(2):
        new_attempt(monkeypatch)
        loggers = [kind(tmp_path), kind(tmp_path)]
        for number, logger in enumerate(loggers):
            logger.resume(0)
            for step in range(3):
                logger.log_metrics({"loss": 10.0 * attempt + number}, step)
            logger.finalize("failed")
        assert [logger.version for logger in loggers] == [0, 1]
    for number in range(2):
        folder = tmp_path / f"lightning_logs/version_{number}"
        if kind is CSVLogger:
            with (folder / "metrics.csv").open(newline="") as file:
                assert [float(r["loss"]) for r in csv.DictReader(file)] == [10.0 + number] * 3
        else:
            assert scalars(folder, "loss") == [(step, 10.0 + number) for step in range(3)]
    new_attempt(monkeypatch, "another")
    assert kind(tmp_path).version == 2


def test_a_second_fit_from_the_start_adds_to_the_first(tmp_path: Path, kind: Any) -> None:
    logger = kind(tmp_path)
    for _ in range(2):
        logger.resume(0)
        logger.log_metrics({"loss": 1.0}, 0)
        logger.finalize("success")
    if kind is CSVLogger:
        assert len(rows(logger)) == 2
    else:
        assert len(scalars(logger.log_dir, "loss")) == 2


# ---- CSV


def test_csv_columns_grow(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, prefix="run", flush_logs_every_n_steps=2)
    logger.log_metrics({"b": 1.0}, 0)
    assert not Path(logger.log_dir, "metrics.csv").exists()
    logger.log_metrics({"b": torch.tensor([2.0])}, 1)
    assert rows(logger) == [{"run-b": "1.0", "step": "0"}, {"run-b": "2.0", "step": "1"}]
    logger.log_metrics({"a": 3}, 2)
    logger.finalize("success")
    assert rows(logger)[2] == {"run-a": "3", "run-b": "", "step": "2"}
    with pytest.raises(ValueError, match="is no scalar"):
        logger.log_metrics({"a": torch.zeros(2)}, 3)


def test_csv_line_that_a_kill_cut_off_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("loss,step\r\n1.0,0\r\n2.0,1\r\n3.")
    writer = ExperimentWriter(tmp_path)
    writer.log_metrics({"loss": 4.0}, 2)
    writer.save()
    assert path.read_text().splitlines() == ["loss,step", "1.0,0", "2.0,1", "4.0,2"]


def test_csv_of_a_given_version_that_starts_over_is_emptied(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        logger = CSVLogger(tmp_path, version="v")
        logger.resume(0)
        logger.log_metrics({"loss": value}, 0)
        logger.finalize("success")
    assert [r["loss"] for r in rows(logger)] == ["2.0"]


def test_csv_experiment_is_lightnings_writer(tmp_path: Path) -> None:
    writer = CSVLogger(tmp_path).experiment
    writer.log_hparams({"lr": 0.1})
    writer.log_metrics({"loss": 1.0})
    assert writer.metrics == [{"loss": 1.0, "step": 0}]
    writer.save()
    assert Path(writer.metrics_file_path).read_bytes() == b"loss,step\r\n1.0,0\r\n"
    assert (Path(writer.log_dir) / writer.NAME_HPARAMS_FILE).exists()


# ---- TensorBoard


class Net(torch.nn.Module):
    def __init__(self, example: Any) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout())
        self.example_input_array = example

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("example", [torch.zeros(2, 4), (torch.zeros(2, 4),), {"inputs": torch.zeros(2, 4)}])
def test_tensorboard_draws_the_graph_and_leaves_the_module_alone(tmp_path: Path, example: Any) -> None:
    logger, model = TensorBoardLogger(tmp_path, log_graph=True), Net(example)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    logger.log_graph(model)
    logger.finalize("success")
    nodes = [node.name for node in events(logger.log_dir).Graph().node]
    assert any("Linear" in name for name in nodes), nodes
    assert model.training
    assert model.net[2].training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tensorboard_graph_without_input_or_wish(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TensorBoardLogger(tmp_path, log_graph=False).log_graph(Net(torch.zeros(2, 4)))
    TensorBoardLogger(tmp_path, log_graph=True).log_graph(Net(None))
    assert "set example_input_array" in caplog.text
    assert list(tmp_path.iterdir()) == []


def hparams_summaries(folder: str) -> dict[str, Any]:
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = events(folder).SummaryMetadata
    return {
        tag: plugin_data_pb2.HParamsPluginData.FromString(content(tag).plugin_data.content)
        for tag in events(folder).summary_metadata
        if tag.startswith("_hparams_")
    }


def test_tensorboard_hparams_tab(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "net": {"act": torch.nn.ReLU, "sizes": [1, 2]}, "none": None})
    logger.finalize("success")
    found = hparams_summaries(logger.log_dir)
    shown = found["_hparams_/session_start_info"].session_start_info.hparams
    assert shown["lr"].number_value == 0.1
    assert shown["net/act"].string_value == "torch.nn.modules.activation.ReLU"
    assert shown["net/sizes"].string_value == "[1, 2]"
    assert [m.name.tag for m in found["_hparams_/experiment"].experiment.metric_infos] == ["hp_metric"]
    assert scalars(logger.log_dir, "hp_metric") == [(0, -1.0)]


def test_tensorboard_hparams_with_metrics_or_none(tmp_path: Path) -> None:
    own = TensorBoardLogger(tmp_path)
    own.log_hyperparams({"lr": 0.1}, {"val/acc": 0.5}, step=3)
    own.finalize("success")
    assert scalars(own.log_dir, "val/acc") == [(3, 0.5)]
    assert events(own.log_dir).Tags()["scalars"] == ["val/acc"]
    without = TensorBoardLogger(tmp_path, default_hp_metric=False)
    without.log_hyperparams({"lr": 0.1})
    without.finalize("success")
    assert hparams_summaries(without.log_dir) == {}
    assert yaml.safe_load(Path(without.log_dir, "hparams.yaml").read_text()) == {"lr": 0.1}


def test_tensorboard_resume_keeps_the_default_metric_single(tmp_path: Path) -> None:
    for attempt in range(2):
        logger = TensorBoardLogger(tmp_path, version=0)
        logger.resume(2 * attempt)
        logger.log_hyperparams({"lr": 0.1})
        logger.log_metrics({"loss": 1.0}, 2 * attempt)
        logger.finalize("success")
    assert scalars(logger.log_dir, "hp_metric") == [(0, -1.0)]
    assert scalars(logger.log_dir, "loss") == [(0, 1.0), (2, 1.0)]


def test_tensorboard_images_charts_prefix_sub_dir_and_writer_arguments(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, prefix="p", sub_dir="part", filename_suffix=".mine")
    assert logger.sub_dir == "part"
    logger.experiment.add_image("digit", torch.zeros(1, 8, 8), 4)
    logger.log_metrics({"loss": torch.tensor(0.5), "pair": {"a": 1, "b": 2}}, 4)
    logger.finalize("success")
    folder = tmp_path / "lightning_logs/version_0/part"
    assert logger.log_dir == str(folder)
    assert [e.step for e in events(folder).Images("digit")] == [4]
    assert scalars(folder, "p-loss") == [(4, 0.5)]
    assert scalars(folder / "p-pair_b", "p-pair") == [(4, 2.0)]
    assert next(folder.glob("*.mine"))
    with pytest.raises(ValueError, match="TensorBoard can plot numbers only"):
        logger.log_metrics({"x": "text"}, 5)
    logger.finalize("success")


def test_tensorboard_thread_ends_with_finalize_and_the_logger_can_go_on(tmp_path: Path) -> None:
    before = threading.active_count()
    logger = TensorBoardLogger(tmp_path)
    for step in range(2):
        logger.log_metrics({"loss": 1.0}, step)
        logger.finalize("success")
        assert threading.active_count() == before
    assert scalars(logger.log_dir, "loss") == [(0, 1.0), (1, 1.0)]


def test_tensorboard_resume_after_the_writer_is_open(tmp_path: Path) -> None:
    """A script may have used logger.experiment before it calls fit."""
    first = TensorBoardLogger(tmp_path, version=0)
    for step in range(6):
        first.log_metrics({"loss": 1.0}, step)
    first.finalize("success")
    second = TensorBoardLogger(tmp_path, version=0)
    second.experiment.add_text("note", "before fit")
    second.resume(4)
    second.log_metrics({"loss": 2.0}, 4)
    second.finalize("success")
    assert scalars(second.log_dir, "loss") == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_tensorboard_event_file_that_a_kill_cut_off(tmp_path: Path) -> None:
    first = TensorBoardLogger(tmp_path, version=0)
    for step in range(3):
        first.log_metrics({"loss": 1.0}, step)
    first.finalize("success")
    file = next(Path(first.log_dir).glob("*tfevents*"))
    file.write_bytes(file.read_bytes()[:-5])
    second = TensorBoardLogger(tmp_path, version=0)
    second.resume(2)
    second.log_metrics({"loss": 2.0}, 2)
    second.finalize("success")
    assert scalars(second.log_dir, "loss") == [(0, 1.0), (1, 1.0), (2, 2.0)]


# ---- the rest


def test_default_logger_depends_on_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(default_logger(tmp_path)) is TensorBoardLogger
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it was not there
    assert type(default_logger(tmp_path)) is CSVLogger
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trainyard\[tensorboard\]'"):
        TensorBoardLogger(tmp_path)


def test_dummy_logger_takes_everything() -> None:
    logger = DummyLogger()
    logger.log_metrics({"a": 1}, 0)
    logger.log_hyperparams({"a": 1})
    logger.log_image("key", [1])
    logger.experiment.add_histogram("x", [1])
    logger.experiment["a"] = logger.experiment["b"]
    assert isinstance(logger, Logger)
    assert pickle.loads(pickle.dumps(logger)).name == ""  # noqa: S301 - our own bytes


def test_names_that_do_not_exist() -> None:
    import trainyard.loggers

    with pytest.raises(AttributeError, match="NeptuneLogger"):
        _ = trainyard.loggers.NeptuneLogger
    assert all(hasattr(trainyard.loggers, name) for name in trainyard.loggers.__all__)
    assert set(trainyard.loggers.__all__) <= set(dir(trainyard.loggers))
