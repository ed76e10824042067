"""WandbLogger with the real SDK offline: its run files are read back record by record."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.loggerparts import QUIET, RUN_UID, Saver, new_attempt, quiet
from trainyard.errors import MisconfigurationException
from trainyard.loggers import WandbLogger

_BLOCK = 32768


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quiet(monkeypatch, tmp_path / "sdk")
    yield
    import wandb

    wandb.teardown()  # ends the service process, which also keeps the environment that it was started in


def records(folder: str | Path, run_id: str | None = None) -> list[dict[str, Any]]:
    """Of all runs below `folder`, in the order of their end, once all is written: `finish` returns before that.

    The file is a log as LevelDB writes it, of protobufs:
    https://github.com/google/leveldb/blob/main/doc/log_format.md ."""
    import wandb
    from google.protobuf.json_format import MessageToDict
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()
    found = []
    files = sorted(
        Path(folder).glob(f"wandb/*run-*/run-{run_id or '*'}.wandb"), key=lambda f: f.stat().st_mtime_ns
    )
    for file in files:
        data, place, parts = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if _BLOCK - place % _BLOCK < 7:
                place += _BLOCK - place % _BLOCK
                continue
            size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            parts += data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):
                record = Record()
                record.ParseFromString(parts)
                found.append(MessageToDict(record, preserving_proto_field_name=True))
                parts = b""
    return found


def history(folder: str | Path, run_id: str | None = None) -> list[dict[str, Any]]:
    rows = []
    for record in records(folder, run_id):
        if "history" in record:
            row: dict[str, Any] = {}
            for item in record["history"]["item"]:
                *outer, name = item.get("nested_key") or [item["key"]]
                place = row
                for part in outer:
                    place = place.setdefault(part, {})
                place[name] = json.loads(item["value_json"])
            rows.append({k: v for k, v in row.items() if not k.startswith("_")})
    return rows


def config(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(folder):
        for part in (record.get("run", {}).get("config", {}), record.get("config", {})):
            for item in part.get("update", []):
                found["/".join(item.get("nested_key", [])) or item["key"]] = json.loads(item["value_json"])
    return found


def artifacts(folder: str | Path) -> list[dict[str, Any]]:
    return [
        r["request"]["log_artifact"]["artifact"]
        for r in records(folder)
        if "log_artifact" in r.get("request", {})
    ] + [r["artifact"] for r in records(folder) if "artifact" in r]


def test_metrics_and_hyperparameters(tmp_path: Path) -> None:
    logger = WandbLogger(name="first", save_dir=tmp_path, project="digits", prefix="p", tags=["a"])
    assert (logger.name, logger.save_dir) == ("digits", str(tmp_path))
    run_id = logger.version
    logger.log_hyperparams({"lr": 0.1, "net": {"act": torch.nn.ReLU, "sizes": (1, 2)}})
    logger.log_metrics({"loss": torch.tensor(0.5), "epoch": 0}, 49)
    logger.log_metrics({"note": 1})
    logger.close()
    assert logger.version == run_id
    assert history(tmp_path) == [
        {"p-loss": 0.5, "p-epoch": 0, "trainer/global_step": 49},
        {"p-note": 1, "trainer/global_step": 49},  # step_sync: W&B adds the newest x
    ]
    run = next(r["run"] for r in records(tmp_path) if "run" in r)
    assert (run["run_id"], run["display_name"], run["project"], run["tags"]) == (
        run_id,
        "first",
        "digits",
        ["a"],
    )
    found = config(tmp_path)
    assert found["lr"] == 0.1
    assert found["net"] == {"act": "torch.nn.modules.activation.ReLU", "sizes": [1, 2]}
    metrics = [r["metric"] for r in records(tmp_path) if "metric" in r]
    assert any(m.get("glob_name") == "*" and m.get("step_metric") == "trainer/global_step" for m in metrics)


def test_nothing_happens_before_the_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WandbLogger(save_dir=tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
    monkeypatch.setenv("RANK", "1")
    other = WandbLogger(save_dir=tmp_path / "logs")
    assert other.version is None
    other.load_state_dict({"id": "abc"})
    assert other.version == "abc"
    other.log_metrics({"loss": 1.0}, 0)
    other.log_image("key", [np.zeros((4, 4, 3))])
    other.log_table("key", columns=["a"], data=[[1]])
    other.experiment.config.update({"a": 1})
    other.watch(torch.nn.Linear(1, 1))
    other.finalize("success")
    assert not (tmp_path / "logs").exists()


def test_media(tmp_path: Path) -> None:
    import wandb

    logger = WandbLogger(save_dir=tmp_path)
    sound, film = tmp_path / "beep.wav", tmp_path / "film.mp4"
    sound.write_bytes(b"RIFF")
    film.write_bytes(b"film")
    logger.log_image(
        "digits", [torch.rand(1, 8, 8), np.zeros((8, 8, 3), dtype=np.uint8)], 3, caption=["one", "two"]
    )
    logger.log_text("said", columns=["who", "what"], data=[["me", "yes"]], step=3)
    logger.log_table("numbers", columns=["a", "b"], data=[[1, 2], [3, 4]])
    if importlib.util.find_spec("soundfile"):  # which wandb.Audio wants even for a file
        logger.log_audio("beep", [str(sound)], 3, caption=["beep"])
    else:
        with pytest.raises(wandb.Error, match="pip install soundfile"):
            logger.log_audio("beep", [str(sound)], 3, caption=["beep"])
    logger.log_video("film", [str(film)], 3)
    logger.close()
    rows: dict[str, Any] = {}
    for row in history(tmp_path):
        rows |= row
    assert (rows["digits"]["count"], rows["digits"]["captions"]) == (2, ["one", "two"])
    assert (rows["said"]["_type"], rows["said"]["nrows"]) == ("table-file", 1)
    assert (rows["numbers"]["ncols"], rows["numbers"]["nrows"]) == (2, 2)
    assert "beep" not in rows or rows["beep"]["_type"] == "audio"
    assert rows["film"]["_type"] == "videos"
    stored = next(tmp_path.glob("wandb/offline-run-*/files")) / rows["said"]["path"]
    assert json.loads(stored.read_text())["data"] == [["me", "yes"]]
    with pytest.raises(TypeError, match=r"log_image\('x'\): expected a list, found str"):
        logger.log_image("x", "image.png")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="caption has 1 entries for 2 items"):
        logger.log_image("x", [1, 2], caption=["one"])


def test_watch_logs_gradients(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path)
    model = torch.nn.Linear(3, 2)
    logger.watch(model, log="gradients", log_freq=1)
    model(torch.ones(1, 3)).sum().backward()
    logger.log_metrics({"loss": 1.0}, 0)
    logger.close()
    assert any(key.startswith("gradients/") for row in history(tmp_path) for key in row)


@pytest.mark.parametrize(
    ("log_model", "during", "at_end"),
    [(False, [], []), (True, [], ["epoch=1", "epoch=2", "last"]), ("all", ["epoch=0", "last"], None)],
)
def test_checkpoints_become_artifacts(
    tmp_path: Path, log_model: Any, during: list[str], at_end: list[str] | None
) -> None:
    logger, saver = (
        WandbLogger(save_dir=tmp_path, log_model=log_model, offline=True),
        Saver(tmp_path / "ckpt"),
    )
    logger.log_metrics({"loss": 1.0}, 0)
    saver.save([logger], 0, 0.9)
    if log_model != "all":
        saver.save([logger], 1, 0.5)
        saver.save([logger], 2, 0.7)
    else:
        assert during == ["epoch=0", "last"]
    logger.finalize("success")
    logger.finalize("success")  # a test after the fit: nothing is new
    logger.close()
    found = [json.loads(a["metadata"]) for a in artifacts(tmp_path)]
    expected = during if at_end is None else at_end
    assert [m["original_filename"] for m in found] == [f"{name}.ckpt" for name in expected]
    for artifact in artifacts(tmp_path):
        assert (artifact["type"], artifact["name"]) == ("model", f"model-{logger.version}")
        assert artifact["manifest"]["contents"][0]["path"] == "model.ckpt"
    if log_model is True:
        assert [set(a["aliases"]) for a in artifacts(tmp_path)] == [
            {"latest", "best"},
            {"latest"},
            {"latest"},
        ]
        assert found[0]["score"] == 0.5
        assert found[0]["ModelCheckpoint"]["monitor"] == "val_loss"


def test_use_artifact_needs_a_server_and_says_so(tmp_path: Path) -> None:
    import wandb

    logger = WandbLogger(save_dir=tmp_path, offline=True)
    with pytest.raises(TypeError, match="Cannot use artifact when in offline mode"):
        logger.use_artifact("team/project/model:v0", "model")
    with pytest.raises(TypeError, match="Cannot use artifact when in offline mode"):
        WandbLogger.download_artifact("team/project/model:v0", tmp_path)
    assert wandb.run is not None


def test_an_experiment_of_ones_own_and_the_active_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    run = wandb.init(mode="offline", dir=tmp_path, id="mine")
    given = WandbLogger(experiment=run)
    assert given.version == "mine"
    given.log_metrics({"a": 1.0}, 0)
    other = WandbLogger(save_dir=tmp_path, id="other")
    assert other.experiment is run
    assert "goes on with the run mine that is active already" in caplog.text
    other.close()


def test_failure_ends_the_run(tmp_path: Path) -> None:
    import wandb

    logger = WandbLogger(save_dir=tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert wandb.run is not None  # for what the script logs after fit
    logger.log_metrics({"loss": 2.0}, 1)
    logger.finalize("failed")
    assert wandb.run is None
    assert len(history(tmp_path)) == 2
    assert [r["exit"]["exit_code"] for r in records(tmp_path) if "exit" in r] == [1]


def test_it_can_be_pickled_after_use(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    again = pickle.loads(pickle.dumps(logger))  # noqa: S301 - our own bytes
    assert again.version == logger.version
    logger.close()


@pytest.mark.parametrize("known", ["from the checkpoint", "from the TrainingRun"])
def test_a_resumed_process_goes_on_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    if known == "from the TrainingRun":
        new_attempt(monkeypatch)
    first = WandbLogger(save_dir=tmp_path)
    first.log_metrics({"loss": 1.0}, 0)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    if known == "from the TrainingRun":
        new_attempt(monkeypatch)
        assert WandbLogger(save_dir=tmp_path, name="another of this script").version != first.version
    second = WandbLogger(save_dir=tmp_path)
    if known == "from the checkpoint":
        second.load_state_dict(state)
    second.resume(1)
    second.log_metrics({"loss": 2.0}, 1)
    second.close()
    assert second.version == first.version
    runs = [r["run"] for r in records(tmp_path) if "run" in r]
    assert {run["run_id"] for run in runs} == {first.version}
    assert [row["trainer/global_step"] for row in history(tmp_path)] == [0, 1]
    mine = WandbLogger(save_dir=tmp_path, id="chosen")
    mine.load_state_dict(state)
    assert mine.version == "chosen"


def test_steps_that_the_server_has_are_not_sent_again(tmp_path: Path) -> None:
    """A resumed run knows its last step from the summary that the server sends; here the run wrote it itself."""
    import wandb

    run = wandb.init(mode="offline", dir=tmp_path)
    run.log({"loss": 0.0, "trainer/global_step": 6})
    logger = WandbLogger(experiment=run)
    logger.resume(4)
    for step in range(4, 9):
        logger.log_metrics({"loss": 1.0}, step)
    logger.close()
    assert [row["trainer/global_step"] for row in history(tmp_path)] == [6, 6, 7, 8]


def test_killed_run_is_on_disk(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from trainyard.loggers import WandbLogger
        logger = WandbLogger(save_dir=sys.argv[1])
        for step in range(3):
            logger.log_metrics({"loss": 1.0}, step)
        print("logged", flush=True)
        sys.stdin.read()
    """
    env = {
        "PYTHONPATH": ":".join(p for p in sys.path if p),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        **QUIET,
    }
    env |= {
        "WANDB_DATA_DIR": str(tmp_path / "data"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        RUN_UID: "uid-9",
    }
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        file = next(tmp_path.glob("wandb/*run-*/*.wandb"))
        deadline = time.monotonic() + 10
        while b"global_step" not in file.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait(20)
    assert [row["trainer/global_step"] for row in history(tmp_path)] == [0, 1, 2]


def test_a_server_that_is_away_makes_it_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    logger = WandbLogger(save_dir=tmp_path, settings=wandb.Settings(init_timeout=2))
    logger.log_metrics({"loss": 1.0}, 0)
    assert logger.experiment.offline
    logger.close()
    assert "W&B cannot be reached" in caplog.text
    assert f"the run {logger.version} is kept" in caplog.text
    assert len(history(tmp_path, logger.version)) >= 1


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert WandbLogger(dir=tmp_path, save_dir="elsewhere").save_dir == str(tmp_path)
    assert WandbLogger(version="v").version == WandbLogger(id="v").version == "v"
    monkeypatch.setenv("WANDB_PROJECT", "from-env")
    assert WandbLogger().name == "from-env"
    WandbLogger(anonymous=True)
    assert "no anonymous runs any more" in caplog.text
    with pytest.raises(MisconfigurationException, match="add_file_policy: 'other'"):
        WandbLogger(add_file_policy="other")  # type: ignore[arg-type]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "wandb", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'trainyard\[wandb\]'"):
            WandbLogger()
