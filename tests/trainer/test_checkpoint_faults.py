"""Damage in the bucket: found, named, and answered with the commit before."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.engine import Checkpointer
from trainyard.checkpoint.errors import CheckpointConfigError, NoUsableCheckpoint
from trainyard.checkpoint.loading import whole
from trainyard.checkpoint.payload import Payload
from trainyard.checkpoint.resume import Loaded
from trainyard.checkpoint.sources import descriptor_of
from trainyard.checkpoint.stores import Store, open_store
from trainyard.peers import Alone
from trainyard_api.checkpoints import Cursor, Fenced, Record, commits_newest_first

pytestmark = pytest.mark.usefixtures("s3_credentials")
STEPS = (10, 20, 30)


@pytest.fixture
def config(prefix: str) -> CheckpointConfig:
    return CheckpointConfig(uri=prefix, run="run-1", every_n_steps=10)


def begin(config: CheckpointConfig) -> tuple[Checkpointer, Loaded | None]:
    checkpointer = Checkpointer(config, Alone(), {"torch": "x"})
    opened = checkpointer.open()
    return checkpointer, None if opened is None else checkpointer.load(whole)


def payload(**state: Any) -> Payload:
    return Payload(checkpoint=state, own={})


def write(config: CheckpointConfig) -> None:
    """Three commits, with the step in each payload."""
    checkpointer, _ = begin(config)
    for step in STEPS:
        tensor = torch.full((100,), float(step))
        checkpointer.finish(step, Cursor(samples=step), lambda: payload(step=step, tensor=tensor))  # noqa: B023
    checkpointer.close(failed=False)


def resumed(config: CheckpointConfig) -> Loaded:
    checkpointer, loaded = begin(config)
    checkpointer.close(failed=False)
    assert loaded is not None
    return loaded


def newest(config: CheckpointConfig) -> tuple[Store, Record]:
    store = open_store(config)
    return store, commits_newest_first(CommitLog(store, "run-1").refresh())[0]


def test_resume_takes_the_newest(config: CheckpointConfig, caplog: pytest.LogCaptureFixture) -> None:
    write(config)
    loaded = resumed(config)
    assert (loaded.record.step, loaded.state.main["step"], loaded.fell_back) == (30, 30, "")
    assert torch.equal(loaded.state.main["tensor"], torch.full((100,), 30.0))
    assert loaded.record.cursor.samples == 30
    assert not caplog.records


def flip(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "SHA-256"),
        (lambda c: c[:-7], "ends before|bytes, not"),
        (lambda c: b"", "ends before|bytes, not"),
        (None, "missing"),
    ],
    ids=["flipped bit", "truncated", "empty", "missing"],
)
def test_a_damaged_shard_falls_back_to_the_commit_before(
    config: CheckpointConfig,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes] | None,
    said: str,
) -> None:
    write(config)
    store, record = newest(config)
    key = record.shards[0].key
    if damage is None:
        store.delete([key])
    else:
        store.put(key, damage(store.get(key)))
    loaded = resumed(config)
    assert loaded.record.step == 20
    assert key in loaded.fell_back
    assert re.search(said, loaded.fell_back)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert key in caplog.text
    assert store.list("commits/")[3] == f"commits/{record.seq:08d}.json", "evidence is not deleted"


def test_a_damaged_record_falls_back_and_is_named(config: CheckpointConfig) -> None:
    write(config)
    store, record = newest(config)
    key = f"commits/{record.seq:08d}.json"
    store.put(key, store.get(key)[:100])
    loaded = resumed(config)
    assert loaded.record.step == 20
    assert key in loaded.fell_back


def test_when_nothing_can_be_read_the_run_does_not_begin_from_zero(config: CheckpointConfig) -> None:
    write(config)
    store = open_store(config)
    for key in store.list("data/"):
        store.put(key, b"rubbish")
    assert store.list("data/")
    with pytest.raises(NoUsableCheckpoint, match="will not begin from zero") as info:
        resumed(config)
    assert info.value.exit_code == 78
    assert len(store.list("commits/")) == 4, "no fence: nothing was begun"


def test_every_flipped_bit_of_a_shard_is_found(config: CheckpointConfig) -> None:
    write(config)
    store, record = newest(config)
    key = record.shards[0].key
    content = store.get(key)
    for number in range(0, len(content), max(1, len(content) // 12)):
        store.put(key, content[:number] + bytes([content[number] ^ 0x10]) + content[number + 1 :])
        assert "SHA-256" in resumed(config).fell_back


@pytest.mark.parametrize("harm", ["gone", "of another shard", "rubbish"])
def test_a_damaged_descriptor_falls_back_too(config: CheckpointConfig, harm: str) -> None:
    write(config)
    store, record = newest(config)
    key = descriptor_of(record.shards[0].key)
    if harm == "gone":
        store.delete([key])
    else:
        others = [k for k in store.list("data/") if k.endswith(".json") and k != key]
        store.put(key, store.get(others[0]) if harm == "of another shard" else b"{]")
    loaded = resumed(config)
    assert loaded.record.step == 20
    assert record.shards[0].key in loaded.fell_back


# ---- fences and the end of a run


def test_a_newer_attempt_ends_an_older_one_at_its_next_save(config: CheckpointConfig) -> None:
    old, _ = begin(replace(config, attempt=1))
    old.finish(10, Cursor(), lambda: payload(step=10))
    new, loaded = begin(replace(config, attempt=2))
    assert loaded is not None
    assert loaded.state.main["step"] == 10
    with pytest.raises(Fenced, match="attempt 2 has begun"):
        old.finish(20, Cursor(), lambda: payload(step=20))
    new.finish(15, Cursor(), lambda: payload(step=15))
    with pytest.raises(Fenced):
        begin(replace(config, attempt=1))
    for checkpointer in (old, new):
        checkpointer.close(failed=False)
    assert resumed(config).state.main["step"] == 15


def test_what_cannot_be_loaded_again_is_refused_when_it_is_saved(config: CheckpointConfig) -> None:
    checkpointer, _ = begin(config)
    with pytest.raises(CheckpointConfigError, match=r"checkpoint\.callbacks\.mine: a pathlib"):
        checkpointer.finish(10, Cursor(), lambda: payload(callbacks={"mine": Path("x")}))
    checkpointer.close(failed=True)


def test_a_snapshot_does_not_change_with_the_model(config: CheckpointConfig) -> None:
    checkpointer, _ = begin(config)
    tensor = torch.zeros(1000)
    assert checkpointer.save(10, Cursor(), lambda: payload(tensor=tensor, part=tensor[10:20]))
    tensor.fill_(1.0)
    checkpointer.finish(10, Cursor(), payload)
    checkpointer.close(failed=False)
    loaded = resumed(config)
    assert not loaded.state.main["tensor"].any()
    assert loaded.state.main["part"].shape == (10,)
