"""ModelCheckpoint in fits: which files there are, and that a restart changes nothing of it."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.callback_runs import Broken, Scored, fitted, listed, run, same, weights
from tests.trainer.forkhost import Host
from tests.trainer.models import loader, trainer
from trainyard.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
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
    """Broken off after one batch or another, and in a validation; with `every` 3 a restart has to train steps again, and meets their files."""
    caplog.set_level(logging.WARNING, "trainyard")

    def make(folder: Path) -> list[Callback]:
        return [ModelCheckpoint(dirpath=folder, **arguments)]

    _, net, (unbroken,) = run(tmp_path / "unbroken", make, epochs=4)
    for stop in (1, 3, 4, 7, 10, 14):
        folder = tmp_path / str(stop)
        run(folder, make, stop_at=stop, epochs=4, every=every)
        if stop in (3, 7):
            run(folder, make, stop_at=stop + 1, epochs=4, every=every, in_validation=True)
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


KILLED = """
import json, os, signal, sys
from pathlib import Path
import trainyard as L
from tests.trainer.callback_runs import Scored, weights
from tests.trainer.models import loader, trainer
from trainyard.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint

folder, kill_at, victim = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

class Kill(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.loop_state.total_batches == kill_at and os.environ["RANK"] == victim:
            os.kill(os.getpid(), signal.SIGKILL)

L.seed_everything(5, verbose=False)
checkpoint = ModelCheckpoint(folder / "files", "{epoch}-{score}", monitor="score", save_top_k=2, save_last=True)
stopping = EarlyStopping("score", patience=3)
module = Scored((3.0, 1.0, 2.0, 0.5, 4.0, 5.0, 6.0))
fit = trainer(
    max_epochs=9, callbacks=[EMAWeightAveraging(decay=0.8), stopping, Kill(), checkpoint], enable_checkpointing=True,
    checkpoint=L.CheckpointConfig(uri=f"file://{folder}/commits", every_n_steps=2, run="test"), strategy="ddp",
    num_sanity_val_steps=0,
)
fit.fit(module, loader(32, 4, shuffle=True), loader(8, 4))
print("RESULT", json.dumps({
    "files": sorted(p.name for p in (folder / "files").iterdir()), "best": Path(checkpoint.best_model_path).name,
    "scores": [[Path(p).name, float(s)] for p, s in checkpoint.best_k_models.items()], "waited": stopping.wait_count,
    "step": fit.global_step, "weights": {n: v.tolist() for n, v in weights(module).items()},
}))
"""


def test_killed_run_ends_like_an_unbroken_one(host: Host, tmp_path: Path) -> None:
    """SIGKILL to one of two ranks, three times."""
    script = tmp_path / "train.py"
    script.write_text(KILLED)

    def result(folder: str, kill_at: int = 0, victim: int = 0) -> dict[str, Any] | None:
        ranks = host.run([str(script), str(tmp_path / folder), str(kill_at), str(victim)], world=2)
        if kill_at:
            assert ranks[victim].code == -9, ranks[victim].output[-3000:]
            return None
        assert [rank.code for rank in ranks] == [0, 0], ranks[0].output[-3000:]
        lines = [next(t for t in r.output.splitlines() if t.startswith("RESULT")) for r in ranks]
        assert lines[0] == lines[1]
        return json.loads(lines[0].removeprefix("RESULT"))  # type: ignore[no-any-return]

    for kill_at, victim in ((5, 0), (11, 1), (19, 0)):
        result("killed", kill_at, victim)
    unbroken = result("unbroken")
    assert unbroken is not None
    assert unbroken["files"] == ["epoch=1-score=1.0.ckpt", "epoch=3-score=0.5.ckpt", "last.ckpt"]
    assert unbroken["step"] == 28
    assert result("killed") == unbroken


FAILS = """
import os, sys
from tests.trainer.callback_runs import Scored
from tests.trainer.models import loader, trainer
from trainyard.callbacks import ModelCheckpoint, OnExceptionCheckpoint

class Failing(Scored):
    def training_step(self, batch, batch_idx):
        if self.global_step == 5 and os.environ["RANK"] == "0":
            raise RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)

checkpoints = [ModelCheckpoint(sys.argv[1], save_on_exception=True), OnExceptionCheckpoint(sys.argv[1])]
fit = trainer(max_epochs=3, callbacks=checkpoints, enable_checkpointing=True, strategy="ddp", num_sanity_val_steps=0)
fit.fit(Failing(), loader(32, 4))
"""


def test_a_rank_that_fails_waits_for_nobody_to_save(host: Host, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(FAILS)
    ranks = host.run([str(script), str(tmp_path / "files")], world=2)
    assert all(rank.code for rank in ranks)
    assert "on purpose" in ranks[0].output
    assert listed(tmp_path / "files") == {"epoch=0-step=4.ckpt", "epoch=1-step=5.ckpt", "on_exception.ckpt"}
    saved = torch.load(tmp_path / "files" / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 5
