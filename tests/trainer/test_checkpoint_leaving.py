"""SIGTERM with little time left: no save is begun that cannot make it, and the log says what is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.forkhost import ROOT, Host
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.deadline import Deadline
from trainyard.checkpoint.engine import Checkpointer
from trainyard.checkpoint.saving import Payload
from trainyard.checkpoint.stores import open_store
from trainyard.peers import Alone
from trainyard_api.checkpoints import Cursor, Record, commits_newest_first

SCRIPT = str(ROOT / "tests/trainer/leaving_run.py")


def commits(folder: Path) -> list[Record]:
    store = open_store(CheckpointConfig(uri=folder.as_uri(), run="r"))
    return commits_newest_first(CommitLog(store, "r").refresh())


def test_a_save_that_cannot_make_it_is_not_begun(host: Host, tmp_path: Path) -> None:
    (rank,) = host.run([SCRIPT, str(tmp_path), "160"], env={"TRAINYARD_GRACE_SECONDS": "3"})
    assert rank.code == 143
    assert (
        "stopping after step 3, which is not saved: a save takes 2.0 s, as far as its size tells"
        in rank.output
    )
    assert "there is no checkpoint, 3 steps are lost" in rank.output
    assert commits(tmp_path) == []


def test_with_more_time_the_same_save_is_made(host: Host, tmp_path: Path) -> None:
    (rank,) = host.run([SCRIPT, str(tmp_path), "160"], env={"TRAINYARD_GRACE_SECONDS": "120"})
    assert rank.code == 143
    assert "not saved" not in rank.output
    assert [(r.step, r.reason) for r in commits(tmp_path)] == [(3, "stop")]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "newest"), [(5.0, 3), (60.0, 4)])
def test_the_save_in_flight_is_seen_through_where_another_one_does_not_fit(
    tmp_path: Path, seconds: float, newest: int
) -> None:
    clock = Clock()
    engine = Checkpointer(CheckpointConfig(uri=tmp_path.as_uri(), run="r"), Alone(), {})
    engine.deadline = Deadline(clock)
    engine.open()

    def payload() -> Payload:
        return Payload(checkpoint={"state_dict": {"w": torch.ones(4)}}, own={})

    try:
        engine.deadline.saw(0.0, 5.0)  # as if the store were slow
        assert engine.save(3, Cursor(), payload, reason="steps")
        clock.now += 3.0  # of which two seconds are left
        why = engine.leave(4, Cursor(), payload, seconds=seconds, size=0)
    finally:
        engine.close(failed=False)
    if newest == 3:
        assert "the newest checkpoint is that of step 3, 1 step is lost" in why
        assert "a save takes 5.0 s" in why
    else:
        assert why == ""
    assert commits(tmp_path)[0].step == engine.committed_step == newest
    found = commits(tmp_path)[0]
    assert found.alive_seconds > 0
    assert (found.failures, found.reason) == (0, "steps" if newest == 3 else "stop")
