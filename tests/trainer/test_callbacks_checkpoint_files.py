"""ModelCheckpoint in fits: which files there are, where, and what is in them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.callback_runs import Scored, fitted, listed
from trainyard.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from trainyard.errors import MisconfigurationException

# ---- which files there are: the same as after Lightning 2.6.6, except where said


@pytest.mark.parametrize(
    ("arguments", "epochs", "expected"),
    [
        ({}, 3, {"epoch=2-step=12"}),
        ({"save_top_k": -1}, 2, {"epoch=0-step=4", "epoch=1-step=8"}),
        ({"monitor": "score", "save_top_k": 2}, 5, {"epoch=1-step=8", "epoch=3-step=16"}),
        ({"monitor": "score", "mode": "max", "save_top_k": 2}, 5, {"epoch=0-step=4", "epoch=4-step=20"}),
        ({"save_top_k": 0, "save_last": True}, 2, {"last"}),
        ({"save_last": "link"}, 2, {"epoch=1-step=8", "last"}),
        ({"every_n_train_steps": 3, "save_top_k": -1}, 2, {"epoch=0-step=3", "epoch=1-step=6"}),
        ({"every_n_epochs": 2, "save_top_k": -1}, 5, {"epoch=1-step=8", "epoch=3-step=16"}),
        ({"save_on_train_epoch_end": False, "save_top_k": -1}, 2, {"epoch=0-step=4", "epoch=1-step=8"}),
        ({"filename": "m", "enable_version_counter": False, "save_top_k": -1}, 3, {"m"}),
        # Lightning overwrites m; its documentation says that -1 keeps all.
        ({"filename": "m", "save_top_k": -1}, 3, {"m", "m-v1", "m-v2"}),
        # Lightning names it after the score of the validation before.
        (
            {"monitor": "score", "every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}-{score}"},
            2, {"step=4-score=3.0", "step=8-score=1.0"},
        ),
    ],
)  # fmt: skip
def test_files_of_a_fit(tmp_path: Path, arguments: dict[str, Any], epochs: int, expected: set[str]) -> None:
    fitted(ModelCheckpoint(dirpath=tmp_path / "files", **arguments), tmp_path, max_epochs=epochs)
    assert listed(tmp_path / "files") == {f"{name}.ckpt" for name in expected}


def test_a_score_that_validation_brings_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        dirpath=tmp_path, monitor="score", every_n_train_steps=2, save_top_k=-1, filename="{step}-{score}"
    )
    fitted(checkpoint, tmp_path, Scored(batches=2), max_epochs=1, val_check_interval=2)
    assert listed(tmp_path) == {"step=2-score=3.0.ckpt", "step=4-score=1.0.ckpt"}


def test_validation_in_every_second_epoch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)
    fitted(checkpoint, tmp_path, max_epochs=4, check_val_every_n_epoch=2)
    assert listed(tmp_path) == {"epoch=1-step=8.ckpt", "epoch=3-step=16.ckpt"}


def test_files_of_another_run_are_not_touched(tmp_path: Path) -> None:
    for name in ("m.ckpt", "last.ckpt"):
        (tmp_path / name).write_text("not ours")
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="m", save_last=True)
    fitted(checkpoint, tmp_path, max_epochs=3)
    assert listed(tmp_path) == {"m.ckpt", "m-v1.ckpt", "last.ckpt", "last-v1.ckpt"}
    assert (tmp_path / "m.ckpt").read_text() == (tmp_path / "last.ckpt").read_text() == "not ours"
    assert checkpoint.last_model_path == f"{tmp_path}/last-v1.ckpt"


def test_two_of_them_in_one_folder(tmp_path: Path) -> None:
    by_score = ModelCheckpoint(dirpath=tmp_path, monitor="score")
    by_loss = ModelCheckpoint(dirpath=tmp_path, monitor="loss", mode="max")
    fitted([by_score, by_loss], tmp_path, max_epochs=2)
    assert by_score.best_model_path != by_loss.best_model_path
    assert {by_score.best_model_path, by_loss.best_model_path} == {
        str(tmp_path / n) for n in listed(tmp_path)
    }


def test_last_is_the_last_and_not_the_best(tmp_path: Path) -> None:
    """Lightning 2.6 writes last.ckpt only when it also writes one of the best."""
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="score", save_last=True)
    fitted(checkpoint, tmp_path, max_epochs=3)
    assert checkpoint.best_model_path.endswith("epoch=1-step=8.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 12


def test_a_link_to_the_last_is_relative(tmp_path: Path) -> None:
    fitted(ModelCheckpoint(dirpath=tmp_path / "a", save_last="link"), tmp_path, max_epochs=2)
    assert (tmp_path / "a" / "last.ckpt").readlink() == Path("epoch=1-step=8.ckpt")
    (tmp_path / "a").rename(tmp_path / "b")
    assert torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)["global_step"] == 8


def test_a_name_of_ones_own_for_the_last(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=0, save_last=True)
    checkpoint.CHECKPOINT_NAME_LAST = "{epoch}-last"
    fitted(checkpoint, tmp_path, max_epochs=3)
    assert listed(tmp_path) == {"epoch=2-last.ckpt"}


def test_attributes_after_a_fit(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="score", save_top_k=2, filename="{epoch}")
    fitted(checkpoint, tmp_path, max_epochs=5)
    best, kth = f"{tmp_path}/epoch=3.ckpt", f"{tmp_path}/epoch=1.ckpt"
    assert (checkpoint.best_model_path, checkpoint.kth_best_model_path) == (best, kth)
    assert checkpoint.best_k_models == {kth: torch.tensor(1.0), best: torch.tensor(0.5)}
    assert (checkpoint.best_model_score, checkpoint.kth_value, checkpoint.current_score) == (0.5, 1.0, 0.5)
    checkpoint.to_yaml()
    assert (tmp_path / "best_k_models.yaml").read_text() == f"{kth}: 1.0\n{best}: 0.5\n"


def test_weights_only(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True)
    fitted(checkpoint, tmp_path, max_epochs=1)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert "state_dict" in saved
    assert "optimizer_states" not in saved


def test_what_is_in_a_file_names_the_file(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="score", filename="{epoch}")
    fitted(checkpoint, tmp_path, max_epochs=2)
    state = torch.load(checkpoint.best_model_path, weights_only=True)["callbacks"][checkpoint.state_key]
    assert state["best_model_path"] == "epoch=1.ckpt"
    assert state["best_model_score"] == 1.0


def test_a_monitor_that_nobody_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MisconfigurationException, match=r"monitor='nope'.*there is: .*loss.*score"):
        fitted(ModelCheckpoint(dirpath=tmp_path, monitor="nope"), tmp_path, max_epochs=2)
    caplog.clear()
    fitted(ModelCheckpoint(dirpath=tmp_path, monitor="nope"), tmp_path, max_epochs=2, limit_val_batches=0)
    assert sum("nope" in record.message for record in caplog.records) == 1


def test_no_file_comes_from_a_rehearsal(tmp_path: Path) -> None:
    fitted(ModelCheckpoint(dirpath=tmp_path, save_last=True), tmp_path, fast_dev_run=True)
    assert not listed(tmp_path)


class Failing(Scored):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5:
            raise RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)


def test_a_file_of_the_state_that_failed(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, save_last=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        fitted([checkpoint, OnExceptionCheckpoint(tmp_path)], tmp_path, Failing(), max_epochs=3)
    names = {"epoch=0-step=4.ckpt", "epoch=1-step=5.ckpt", "last.ckpt", "on_exception.ckpt"}
    assert listed(tmp_path) == names
    assert checkpoint.best_model_path.endswith("epoch=0-step=4.ckpt")
    for name in names - {"epoch=0-step=4.ckpt"}:
        assert torch.load(tmp_path / name, weights_only=True)["global_step"] == 5


def test_trouble_with_that_file_does_not_hide_the_failure(tmp_path: Path) -> None:
    (tmp_path / "on_exception.ckpt").mkdir()
    with pytest.raises(RuntimeError, match="on purpose"):
        fitted(OnExceptionCheckpoint(tmp_path), tmp_path, Failing(), max_epochs=3)


def test_by_time(tmp_path: Path) -> None:
    """The interval is over at every step."""
    checkpoint = ModelCheckpoint(
        dirpath=tmp_path, save_top_k=-1, train_time_interval=timedelta(microseconds=1)
    )
    fitted(checkpoint, tmp_path, max_epochs=1, limit_train_batches=3)
    assert "epoch=0-step=3.ckpt" in listed(tmp_path)
    assert len(listed(tmp_path)) >= 2
    never = ModelCheckpoint(dirpath=tmp_path / "never", train_time_interval=timedelta(hours=1))
    fitted(never, tmp_path, max_epochs=2)
    assert not listed(tmp_path / "never")


# ---- places


def test_in_a_bucket(
    tmp_path: Path, prefix: str, run_env: dict[str, str], s3_credentials: None, monkeypatch: pytest.MonkeyPatch,
    data_folder: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRAINYARD_CHECKPOINT_ENDPOINT", run_env["TRAINYARD_CHECKPOINT_ENDPOINT"])
    checkpoint = ModelCheckpoint(dirpath=prefix, monitor="score", save_top_k=2, save_last="link")
    fitted(checkpoint, tmp_path, max_epochs=5)
    assert listed(data_folder) == {"epoch=1-step=8.ckpt", "epoch=3-step=16.ckpt", "last.ckpt"}
    assert checkpoint.best_model_path == f"{prefix}/epoch=3-step=16.ckpt"
    assert set(checkpoint.state_dict()["best_k_models"]) == {"epoch=1-step=8.ckpt", "epoch=3-step=16.ckpt"}
    other = ModelCheckpoint(dirpath=prefix)
    fitted(other, tmp_path, max_epochs=2)
    assert other.best_model_path == f"{prefix}/epoch=1-step=8-v1.ckpt"


def test_by_default_beside_the_logs(tmp_path: Path) -> None:
    from trainyard.loggers import CSVLogger

    checkpoint = ModelCheckpoint()
    fitted(checkpoint, tmp_path, max_epochs=1, logger=CSVLogger(tmp_path, name="runs"))
    assert checkpoint.dirpath == f"{tmp_path}/runs/version_0/checkpoints"
    alone = ModelCheckpoint()
    fitted(alone, tmp_path, max_epochs=1)
    assert alone.dirpath == f"{tmp_path}/checkpoints"
