"""Damage in the bucket: found, named, and answered with the commit before. Nothing in a shard is ever executed."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import os
import pickle
import zipfile
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
from trainyard.checkpoint.resume import Loaded
from trainyard.checkpoint.stores import Store, open_store
from trainyard.peers import Alone
from trainyard_api.checkpoints import Cursor, Fenced, Record, commits_newest_first

pytestmark = pytest.mark.usefixtures("s3_credentials")
STEPS = (10, 20, 30)


@pytest.fixture
def config(prefix: str) -> CheckpointConfig:
    return CheckpointConfig(uri=prefix, run="run-1", every_n_steps=10)


def begin(config: CheckpointConfig) -> tuple[Checkpointer, Loaded]:
    checkpointer = Checkpointer(config, Alone(), {"torch": "x"})
    return checkpointer, checkpointer.resume()


def write(config: CheckpointConfig) -> None:
    """Three commits, with the step in each payload."""
    checkpointer, _ = begin(config)
    for step in STEPS:
        payload = {"step": step, "tensor": torch.full((100,), float(step))}
        checkpointer.finish(step, Cursor(samples=step), lambda: payload)  # noqa: B023 - called at once
    checkpointer.close(failed=False)


def resumed(config: CheckpointConfig) -> Loaded:
    checkpointer, loaded = begin(config)
    checkpointer.close(failed=False)
    return loaded


def newest(config: CheckpointConfig) -> tuple[Store, Record]:
    store = open_store(config)
    return store, commits_newest_first(CommitLog(store, "run-1").refresh())[0]


def test_resume_takes_the_newest(config: CheckpointConfig, caplog: pytest.LogCaptureFixture) -> None:
    write(config)
    loaded = resumed(config)
    assert loaded.record is not None
    assert (loaded.record.step, loaded.main["step"], loaded.fell_back) == (30, 30, "")
    assert torch.equal(loaded.main["tensor"], torch.full((100,), 30.0))
    assert loaded.record.cursor.samples == 30
    assert not caplog.records


def flip(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "SHA-256"),
        (lambda c: c[:-7], "bytes, its commit says"),
        (lambda c: c + b"more", "bytes, its commit says"),
        (lambda c: b"", "0 bytes"),
        (None, "missing"),
    ],
    ids=["flipped bit", "truncated", "longer", "empty", "missing"],
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
    assert loaded.record is not None
    assert loaded.record.step == 20
    assert key in loaded.fell_back
    assert said in loaded.fell_back
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert key in caplog.text
    assert store.list("commits/")[3] == f"commits/{record.seq:08d}.json", "evidence is not deleted"


def test_a_damaged_record_falls_back_and_is_named(config: CheckpointConfig) -> None:
    write(config)
    store, record = newest(config)
    key = f"commits/{record.seq:08d}.json"
    store.put(key, store.get(key)[:100])
    loaded = resumed(config)
    assert loaded.record is not None
    assert loaded.record.step == 20
    assert key in loaded.fell_back


def test_when_nothing_can_be_read_the_run_does_not_begin_from_zero(config: CheckpointConfig) -> None:
    write(config)
    store = open_store(config)
    for key in store.list("data/"):
        store.put(key, b"rubbish")
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


# ---- malice: the commit is consistent, the shard is not what it should be


class Runs:
    """Pickles to a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def torch_zip(data: bytes) -> bytes:
    """A file as torch.save writes it, with `data` as its pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3")
        file.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def malicious(kind: str, mark: Path) -> bytes:
    command = f"touch {mark}"
    if kind == "os.system":
        return torch_zip(pickle.dumps({"x": Runs(os.system, command)}, protocol=2))
    if kind == "eval":
        return torch_zip(pickle.dumps(Runs(eval, f"open({str(mark)!r}, 'w')"), protocol=2))
    if kind == "subprocess":
        import subprocess

        return torch_zip(pickle.dumps([Runs(subprocess.check_output, ["touch", str(mark)])], protocol=2))
    if kind == "plain pickle, not a zip":
        return pickle.dumps(Runs(os.system, command))
    if kind == "legacy torch file":
        buffer = io.BytesIO()
        torch.save({"x": Runs(os.system, command)}, buffer, _use_new_zipfile_serialization=False)
        return buffer.getvalue()
    if kind == "getattr chain":
        return torch_zip(
            pickle.dumps(Runs(getattr, Runs(importlib.import_module, "os"), "system"), protocol=2)
        )
    if kind == "torch.load again":
        inner = mark.with_suffix(".inner")
        inner.write_bytes(pickle.dumps(Runs(os.system, command)))
        return torch_zip(
            pickle.dumps(
                Runs(torch.load, str(inner), None, Runs(importlib.import_module, "pickle")), protocol=2
            )
        )
    if kind == "numpy object array":
        import numpy as np

        return torch_zip(pickle.dumps(np.array([Runs(os.system, command)], dtype=object), protocol=2))
    if kind == "not a dict":
        buffer = io.BytesIO()
        torch.save(torch.zeros(3), buffer)
        return buffer.getvalue()
    if kind == "TorchScript":
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
        return buffer.getvalue()
    raise AssertionError(kind)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "kind",
    [
        "os.system", "eval", "subprocess", "plain pickle, not a zip", "legacy torch file", "getattr chain",
        "torch.load again", "numpy object array", "not a dict", "TorchScript",
    ],
)  # fmt: skip
def test_code_in_a_shard_is_refused_and_never_runs(
    config: CheckpointConfig, tmp_path: Path, kind: str
) -> None:
    write(config)
    store, record = newest(config)
    mark = tmp_path / "executed"
    content = malicious(kind, mark)
    (shard,) = record.shards
    store.put(shard.key, content)
    forged = replace(
        record, shards=[replace(shard, size=len(content), sha256=hashlib.sha256(content).hexdigest())]
    )
    store.put(f"commits/{record.seq:08d}.json", json.dumps(forged.to_json()).encode())
    loaded = resumed(config)
    assert loaded.record is not None
    assert loaded.record.step == 20
    assert shard.key in loaded.fell_back
    assert not mark.exists()


# ---- fences and the end of a run


def test_a_newer_attempt_ends_an_older_one_at_its_next_save(config: CheckpointConfig) -> None:
    old, _ = begin(replace(config, attempt=1))
    old.finish(10, Cursor(), lambda: {"step": 10})
    new, loaded = begin(replace(config, attempt=2))
    assert loaded.main["step"] == 10
    with pytest.raises(Fenced, match="attempt 2 has begun"):
        old.finish(20, Cursor(), lambda: {"step": 20})
    new.finish(15, Cursor(), lambda: {"step": 15})
    with pytest.raises(Fenced):
        begin(replace(config, attempt=1))
    for checkpointer in (old, new):
        checkpointer.close(failed=False)
    assert resumed(config).main["step"] == 15


def test_what_cannot_be_loaded_again_is_refused_when_it_is_saved(config: CheckpointConfig) -> None:
    checkpointer, _ = begin(config)
    with pytest.raises(CheckpointConfigError, match=r"checkpoint\.callbacks\.mine: a pathlib"):
        checkpointer.finish(10, Cursor(), lambda: {"callbacks": {"mine": Path("x")}})
    checkpointer.close(failed=True)


def test_a_snapshot_does_not_change_with_the_model(config: CheckpointConfig) -> None:
    checkpointer, _ = begin(config)
    tensor = torch.zeros(1000)
    assert checkpointer.save(10, Cursor(), lambda: {"tensor": tensor, "part": tensor[10:20]})
    tensor.fill_(1.0)
    checkpointer.finish(10, Cursor(), dict)
    checkpointer.close(failed=False)
    loaded = resumed(config)
    assert not loaded.main["tensor"].any()
    assert loaded.main["part"].shape == (10,)
