"""ModelCheckpoint's parts: what files are called, which are kept, and a state that moves with its folder."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.callback_runs import fitted
from trainyard.callbacks import ModelCheckpoint
from trainyard.callbacks import checkpoint_folder as files
from trainyard.callbacks.checkpoint_names import fill, first_free
from trainyard.callbacks.checkpoint_topk import TopK
from trainyard.errors import MisconfigurationException

# ---- names


@pytest.mark.parametrize(
    ("template", "insert", "name"),
    [
        ("{epoch}-{step}", True, "epoch=2-step=10"),
        ("{epoch:02d}-{val_loss:.2f}", True, "epoch=02-val_loss=0.32"),
        ("{epoch:02d}-{val_loss:.2f}", False, "02-0.32"),
        ("e{epoch:03d}_{nothing:.1f}", False, "e002_0.0"),
        ("{missing:d}", True, "missing=0"),
        ("sub/{val/acc:.1f}", False, "sub/0.9"),
        ("{val/acc:.1f}", True, "val/acc=0.9"),
        ("plain", True, "plain"),
        ("{a}-{ab}", True, "a=1-ab=2"),
    ],
)
def test_templates_are_filled_as_lightning_fills_them(template: str, insert: bool, name: str) -> None:
    metrics = {"epoch": 2, "step": 10, "val_loss": torch.tensor(0.3214), "val/acc": 0.9, "a": 1, "ab": 2}
    assert fill(template, metrics, insert_names=insert) == name


def test_a_template_that_cannot_be_filled_is_named() -> None:
    with pytest.raises(MisconfigurationException, match=r"filename='\{loss:d\}'"):
        fill("{loss:d}", {"loss": 0.5})


def test_the_first_free_version_is_taken() -> None:
    taken = {"m", "m-v1"}
    assert first_free(lambda v: "m" if v is None else f"m-v{v}", taken.__contains__) == "m-v2"
    assert first_free(lambda v: "n" if v is None else f"n-v{v}", taken.__contains__) == "n"


def test_names_as_users_ask_for_them(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}-{a/b:.1f}")
    assert checkpoint.format_checkpoint_name({"epoch": 1}) == f"{tmp_path}/epoch=1-a/b=0.0.ckpt"
    assert checkpoint.format_checkpoint_name({"epoch": 1}, ver=3) == f"{tmp_path}/epoch=1-a/b=0.0-v3.ckpt"
    named = checkpoint.format_checkpoint_name({"a/b": 3.5}, filename="x{a/b}", prefix="p")
    assert named == f"{tmp_path}/p-xa/b=3.5.ckpt"
    assert ModelCheckpoint().format_checkpoint_name({"epoch": 1, "step": 2}) == "epoch=1-step=2.ckpt"
    remote = ModelCheckpoint(dirpath="s3://bucket/run/").format_checkpoint_name({})
    assert remote == "s3://bucket/run/epoch=0-step=0.ckpt"


def test_places(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert ModelCheckpoint(dirpath=tmp_path / "link").dirpath == f"{tmp_path}/real"
    assert ModelCheckpoint(dirpath=f"file://{tmp_path}/a%20b").dirpath == f"{tmp_path}/a b"
    with pytest.raises(MisconfigurationException, match="gs://"):
        ModelCheckpoint(dirpath="gs://bucket/run")


def test_state_key_is_lightnings() -> None:
    key = ModelCheckpoint(monitor="a", train_time_interval=timedelta(minutes=1)).state_key
    assert key == (
        "ModelCheckpoint{'monitor': 'a', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 0, "
        "'train_time_interval': datetime.timedelta(seconds=60)}"
    )
    assert "'every_n_epochs': 1" in ModelCheckpoint().state_key


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 2}, "Give monitor"),
        ({"mode": "up"}, "mode='up'"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
        ({"every_n_epochs": 1, "every_n_train_steps": 1}, "exclude one another"),
        ({"every_n_train_steps": 1, "train_time_interval": timedelta(1)}, "exclude one another"),
        ({"train_time_interval": timedelta(0)}, "train_time_interval"),
        ({"save_last": "no"}, "save_last='no'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        ModelCheckpoint(**arguments)


# ---- ranking


def ranked(k: int, mode: str, values: list[float]) -> TopK:
    top = TopK(k, mode)
    for number, value in enumerate(values):
        if top.admits(top.score(value)):
            top.add(str(number), value)
    return top


@pytest.mark.parametrize(
    ("k", "mode", "values", "kept"),
    [
        (2, "min", [3, 1, 2, 0.5, 4], {"1": 1, "3": 0.5}),
        (2, "max", [3, 1, 2, 0.5, 4], {"0": 3, "4": 4}),
        (-1, "min", [3, 1], {"0": 3, "1": 1}),
        (1, "min", [1, 1, 1], {"0": 1}),
        (2, "min", [math.nan, 2, 1], {"1": 2, "2": 1}),
        (1, "max", [math.nan, 2], {"1": 2}),
    ],
)
def test_the_best_are_kept(k: int, mode: str, values: list[float], kept: dict[str, float]) -> None:
    assert ranked(k, mode, values).scores == kept


def test_no_number_is_the_worst_there_is() -> None:
    assert ranked(1, "min", [math.nan]).scores == {"0": math.inf}
    assert ranked(1, "max", [math.nan]).scores == {"0": -math.inf}


# ---- the folder


def test_a_file_goes_when_a_state_without_it_is_committed(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{n}.ckpt") for n in range(2)]
    folder = files.Folder(str(tmp_path))
    for path in paths:
        Path(path).write_text("")
        folder.wrote(path)
    folder.retire(paths[0], step=7)
    folder.sweep(6)
    assert Path(paths[0]).exists()
    folder.sweep(7)
    assert not Path(paths[0]).exists()
    assert Path(paths[1]).exists()


def test_files_of_other_folders_stay(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "a.ckpt"
    elsewhere.parent.mkdir()
    elsewhere.write_text("")
    folder = files.Folder(str(tmp_path / "here"))
    folder.wrote(str(elsewhere))
    folder.retire(str(elsewhere), 1)
    folder.sweep(None)
    assert elsewhere.exists()


def test_state_goes_with_a_folder_that_moves(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    first = ModelCheckpoint(dirpath=before, monitor="score", save_top_k=2)
    fitted(first, tmp_path, max_epochs=2)
    state = first.state_dict()
    assert not any(Path(path).is_absolute() for path in state["best_k_models"])
    before.rename(after)
    second = ModelCheckpoint(dirpath=after, monitor="score", save_top_k=2)
    second.load_state_dict(state)
    assert second.best_model_path == first.best_model_path.replace("before", "after")
    assert all(Path(path).parent == after for path in second.best_k_models)


def test_state_of_a_folder_that_stayed_behind(tmp_path: Path) -> None:
    first = ModelCheckpoint(dirpath=tmp_path / "one", monitor="score")
    fitted(first, tmp_path, max_epochs=2)
    second = ModelCheckpoint(dirpath=tmp_path / "two", monitor="score")
    second.load_state_dict(first.state_dict())
    assert second.best_model_path == first.best_model_path
    assert second.best_model_score == first.best_model_score


def test_lightnings_state_with_whole_paths(tmp_path: Path) -> None:
    """As dumped from a run of Lightning 2.6.6."""
    path = f"{tmp_path}/epoch=1-step=8.ckpt"
    Path(path).write_text("")
    state = {
        "monitor": "val", "best_model_score": torch.tensor(1.0), "best_model_path": path, "dirpath": str(tmp_path),
        "current_score": torch.tensor(1.0), "best_k_models": {path: torch.tensor(1.0)}, "kth_best_model_path": path,
        "kth_value": torch.tensor(1.0), "last_model_path": "",
    }  # fmt: skip
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="val")
    checkpoint.load_state_dict(state)
    assert checkpoint.best_model_path == checkpoint.kth_best_model_path == path
    assert checkpoint.best_k_models == {path: torch.tensor(1.0)}
    assert checkpoint.state_dict()["best_k_models"] == {"epoch=1-step=8.ckpt": torch.tensor(1.0)}
