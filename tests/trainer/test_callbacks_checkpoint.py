"""ModelCheckpoint: which files there are, what they are called, and that a restart changes nothing of it."""

from __future__ import annotations

import logging
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.callback_runs import Broken, Scored, run, same, weights
from tests.trainer.forkhost import Host
from tests.trainer.models import loader, trainer
from trainyard.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
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


# ---- which files there are: the same as after Lightning 2.6.6, except where said


def fitted(checkpoints: Callback | list[Callback], folder: Path, module: Any = None, **kwargs: Any) -> Any:
    fit = trainer(
        callbacks=checkpoints,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **kwargs,
    )
    fit.fit(module or Scored(), loader(32, 8), loader(8, 8))
    return fit


def listed(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


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


# ---- restarts

KINDS = {
    "best two, and last": {"monitor": "score", "save_top_k": 2, "save_last": True, "filename": "{epoch}-{score}"},
    "all by loss, every 3 steps": {"monitor": "loss", "save_top_k": 3, "every_n_train_steps": 3},
    "newest, linked": {"save_last": "link"},
    "same name": {"monitor": "score", "save_top_k": 2, "filename": "m"},
}  # fmt: skip


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("every", [1, 3])
def test_a_broken_run_ends_with_the_same_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, arguments: dict[str, Any], every: int
) -> None:
    """Broken off after each batch in turn; with `every` 3 a restart has to train steps again, and meets their files."""
    caplog.set_level(logging.WARNING, "trainyard")

    def make(folder: Path) -> list[Callback]:
        return [ModelCheckpoint(dirpath=folder, **arguments)]

    _, net, (unbroken,) = run(tmp_path / "unbroken", make, epochs=4)
    for stop in range(1, 16, 2):
        folder = tmp_path / str(stop)
        run(folder, make, stop_at=stop, epochs=4, every=every)
        run(folder, make, stop_at=stop + 1, epochs=4, every=every, in_validation=True) if stop in (
            3,
            7,
        ) else None
        _, resumed, (broken,) = run(folder, make, epochs=4, every=every)
        assert same(weights(resumed), weights(net)), stop
        assert outcome(broken) == outcome(unbroken), stop
        assert listed(folder / "files") == listed(tmp_path / "unbroken" / "files"), stop
    assert "no longer finds" not in caplog.text


def outcome(checkpoint: Any) -> dict[str, Any]:
    """All that is said of files and scores."""
    state = checkpoint.state_dict()
    del state["dirpath"]
    return {**state, "best_k_models": list(state["best_k_models"].items())}


def test_a_file_that_is_gone_is_not_counted_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make(folder: Path) -> list[Callback]:
        return [ModelCheckpoint(dirpath=folder, monitor="score", filename="{epoch}")]

    _, _, (first,) = run(tmp_path, make, stop_at=10)
    Path(first.best_model_path).unlink()
    _, _, (second,) = run(tmp_path, make, epochs=3)
    assert "no longer finds" in caplog.text
    assert Path(second.best_model_path).name == "epoch=2.ckpt"
    assert second.best_model_score == 2.0


def test_fit_from_a_file(tmp_path: Path) -> None:
    """Nothing of the earlier run's best is forgotten, and the file that was asked for is not removed."""
    first = ModelCheckpoint(dirpath=tmp_path, monitor="score", filename="{epoch}")
    fitted(first, tmp_path, max_epochs=2)
    second = ModelCheckpoint(dirpath=tmp_path, monitor="score", filename="{epoch}")
    fit = trainer(
        callbacks=second,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        max_epochs=4,
    )
    fit.fit(Scored(), loader(32, 8), loader(8, 8), ckpt_path=first.best_model_path)
    assert fit.global_step == 16
    assert listed(tmp_path) == {"epoch=1.ckpt", "epoch=3.ckpt"}
    assert second.best_model_path == f"{tmp_path}/epoch=3.ckpt"


def test_an_exception_is_no_reason_to_lose_a_file(tmp_path: Path) -> None:
    """A crash between the writing of a file and the removal of the one before."""

    class Crashing(ModelCheckpoint):
        def _sweep(self, trainer: Any) -> None:
            if self.folder.retired:
                raise Broken

    Crashing.__qualname__ = "ModelCheckpoint"  # which is part of the state's key
    with pytest.raises(Broken):
        fitted(Crashing(dirpath=tmp_path), tmp_path, max_epochs=3)
    assert listed(tmp_path) == {"epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"}
    again = ModelCheckpoint(dirpath=tmp_path)
    fit = trainer(callbacks=again, enable_checkpointing=True, num_sanity_val_steps=0, max_epochs=3)
    fit.fit(Scored(), loader(32, 8), loader(8, 8), ckpt_path=tmp_path / "epoch=1-step=8.ckpt")
    assert listed(tmp_path) == {"epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"}


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


TWO_RANKS = """
import json, os, sys
from pathlib import Path
import torch
import trainyard as L
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks import EarlyStopping, ModelCheckpoint

rank = int(os.environ["RANK"])

class Apart(Regression):
    def validation_step(self, batch, batch_idx):
        # Rank 1 alone would keep other files, and stop at another time.
        scores = [3.0, 1.0, 2.0, 0.5, 4.0] if rank == 0 else [1.0, 2.0, 3.0, 4.0, 5.0]
        self.log("score", scores[self.current_epoch])

folder = Path(sys.argv[1])
checkpoint = ModelCheckpoint(dirpath=None if rank else folder, monitor="score", save_top_k=2, filename="{score}")
stopping = EarlyStopping("score", patience=2)
fit = trainer(
    max_epochs=5, callbacks=[checkpoint, stopping], enable_checkpointing=True, num_sanity_val_steps=0, strategy="ddp"
)
fit.fit(Apart(), loader(16, 4), loader(8, 4))
print("RESULT", json.dumps([checkpoint.best_model_path, sorted(checkpoint.best_k_models), stopping.wait_count, fit.global_step]))
"""


def test_all_ranks_say_the_same(host: Host, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    ranks = host.run([str(script), str(tmp_path / "files")], world=2)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output[-3000:] + ranks[1].output[-3000:]
    said = [next(t for t in rank.output.splitlines() if t.startswith("RESULT")) for rank in ranks]
    assert said[0] == said[1]
    assert listed(tmp_path / "files") == {"score=1.0.ckpt", "score=0.5.ckpt"}
