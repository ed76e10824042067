"""Each commit says why it was made, what was logged by then, and what the run had lived through."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer.models import Regression, loader, trainer
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.stores import open_store
from trainyard_api.checkpoints import Record


class Logging(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log_dict({"loss": loss, "nothing": torch.tensor(float("nan")), "step": float(self.global_step)})
        time.sleep(0.01)
        return loss


def commits(config: L.CheckpointConfig) -> list[Record]:
    records = CommitLog(open_store(config), "r").refresh()
    return sorted((r for r in records if r.kind == "commit"), key=lambda r: r.seq)


def fit(folder: Path, **config: Any) -> list[Record]:
    made = L.CheckpointConfig(uri=folder.as_uri(), run="r", keep=50, **config)
    trainer(max_epochs=3, checkpoint=made).fit(Logging(), loader(24))
    return commits(made)


def test_epochs_and_the_end(tmp_path: Path) -> None:
    found = fit(tmp_path)
    assert [(r.step, r.reason) for r in found if r.step in (6, 18)] == [(6, "epoch"), (18, "end")]
    assert {r.reason for r in found} == {"epoch", "end"}


@pytest.mark.parametrize(
    ("config", "reason"), [({"every_n_steps": 4}, "steps"), ({"every_n_seconds": 0.05}, "time")]
)
def test_triggers(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    found = fit(tmp_path, **config)
    assert found[0].reason == reason
    assert {r.reason for r in found} <= {reason, "end"}
    for record in found:
        assert set(record.metrics) == {"loss", "step"}, "numbers that are finite"
        assert record.metrics["step"] == record.step - 1
        assert record.stall_seconds > 0
    lives = [r.alive_seconds for r in found]
    assert lives == sorted(lives)


def test_the_life_goes_on_over_attempts(tmp_path: Path) -> None:
    first = fit(tmp_path, every_n_steps=4)
    again = L.CheckpointConfig(uri=tmp_path.as_uri(), run="r", keep=50, every_n_steps=4)
    trainer(max_epochs=4, checkpoint=again).fit(Logging(), loader(24))
    last = commits(again)[-1]
    assert last.step == 24
    assert last.alive_seconds > first[-1].alive_seconds
    assert last.failures == 0, "the first one came to its end"
