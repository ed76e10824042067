"""ModelCheckpoint over restarts, and in several processes: the same files as without."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.callback_runs import Broken, Scored, fitted, listed, run, same, weights
from tests.trainer.forkhost import Host
from tests.trainer.models import loader, trainer
from trainyard.callbacks import Callback, ModelCheckpoint

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
    """Broken off after one batch or another, and in a validation; with `every` 3 a restart has to train steps again, and
    meets their files."""
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


# ---- several processes

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
from tests.trainer.callback_runs import Scored, Settled, weights
from tests.trainer.models import loader, trainer
from trainyard.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint

folder, kill_at, victim = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

class Kill(Settled):
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
