"""What a node keeps: the rules, and the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.format.digest import Descriptor, digest, part_size, tree_hash
from trainyard.checkpoint.tier import open_tier
from trainyard.checkpoint.tier.keeper import Keeper, Shelf
from trainyard.checkpoint.tier.known import read_known, write_known
from trainyard.checkpoint.tier.rules import Save, ring, save_of, surplus
from trainyard.peers import Alone
from trainyard_api.checkpoints import Record, Shard, shard_key

SAVES = st.tuples(st.integers(1, 3), st.integers(0, 6))


@given(held=st.sets(SAVES), committed=st.none() | SAVES, in_flight=st.sets(SAVES, max_size=1))
def test_what_is_kept_is_the_newest_commit_or_may_become_it(
    held: set[Save], committed: Save | None, in_flight: set[Save]
) -> None:
    gone = surplus(held, committed=committed, in_flight=in_flight)
    left = held - gone
    assert gone <= held
    if committed is None:
        assert not gone & in_flight
    else:
        assert committed not in gone
        assert all(save >= committed for save in left)
    settled = left - in_flight
    assert len(settled) <= (1 if in_flight else 3)
    newer = {save for save in held if committed is None or save >= committed} - in_flight
    assert bool(settled) == bool(newer), "something is kept if there is something worth it"


def test_what_nobody_said_was_committed_goes_when_the_next_save_is_in_flight() -> None:
    assert surplus({(1, 10), (1, 20)}, committed=(1, 10), in_flight=set()) == set()
    assert surplus({(1, 10), (1, 20)}, committed=(1, 20), in_flight=set()) == {(1, 10)}
    assert surplus({(1, 10), (1, 20)}, committed=(1, 10), in_flight={(1, 30)}) == {(1, 20)}
    assert surplus({(1, 10), (1, 20)}, committed=None, in_flight={(1, 30)}) == {(1, 10)}
    assert surplus({(1, 90), (2, 20)}, committed=(2, 20), in_flight=set()) == {(1, 90)}, "back in step"


@pytest.mark.parametrize(
    ("nodes", "me", "copies", "expected"),
    [("abcd", 0, 1, "b"), ("abcd", 3, 2, "ab"), ("ab", 0, 5, "b"), ("a", 0, 1, ""), ("abc", 1, 0, "")],
)
def test_the_ring(nodes: str, me: int, copies: int, expected: str) -> None:
    assert ring(nodes, me, copies) == list(expected)


def test_only_the_names_of_shards_are_names_of_shards(tmp_path: Path) -> None:
    assert save_of(shard_key(120, 3, 1, 4)) == (3, 120)
    for name in ("../" + shard_key(1, 1, 0, 1), "/etc/passwd", "data/x", shard_key(1, 1, 0, 1) + "\n", ""):
        with pytest.raises(ValueError, match="not the key of a shard"):
            save_of(name)
        with pytest.raises(ValueError, match="not the key of a shard"):
            Shelf(tmp_path).path(name)


def put(shelf: Shelf, step: int, *, attempt: int = 1, described: bool = True) -> Path:
    data = b"x" * 1000
    key = shard_key(step, attempt, 0, 1)
    path = shelf.root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if described:
        shelf.put(describe(key, data))
    return path


def describe(key: str, data: bytes) -> Descriptor:
    shard = Shard(
        key=key, rank=0, size=len(data), sha256=tree_hash([digest(data)]), part_size=part_size(len(data))
    )
    return Descriptor(shard=shard, parts=[digest(data)])


def test_an_uploader_finds_what_the_one_before_it_kept(tmp_path: Path) -> None:
    kept = put(Shelf(tmp_path), 10)
    half = put(Shelf(tmp_path / "copies"), 10).with_suffix(".tmp")
    half.write_bytes(b"half")
    Keeper(tmp_path, keep=True)
    assert kept.exists()
    assert not half.exists()
    Keeper(tmp_path, keep=False)
    assert not kept.exists()
    assert not (tmp_path / "copies").exists()


def test_the_next_attempt_sweeps_what_a_dead_worker_left_and_nothing_else(tmp_path: Path) -> None:
    shelf, keeper = Shelf(tmp_path), Keeper(tmp_path, keep=True)
    kept, left, busy = put(shelf, 10), put(shelf, 20, described=False), put(shelf, 30, described=False)
    new = put(shelf, 11, attempt=2, described=False)
    keeper.began((2, 11), 0, new, {busy, new})
    assert [path.exists() for path in (kept, left, busy, new)] == [True, False, True, True]


def test_a_file_of_the_same_name_is_not_what_the_old_descriptor_says(tmp_path: Path) -> None:
    shelf, keeper = Shelf(tmp_path), Keeper(tmp_path, keep=True)
    path = put(shelf, 10)
    path.write_bytes(b"y" * 1000)
    keeper.began((1, 10), 0, path, {path})
    assert shelf.shards() == []


def test_a_file_that_is_read_is_not_given_to_be_written(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, keep=False)
    path = put(keeper.own, 10, described=False)
    keeper.began((1, 10), 0, path, {path})
    with keeper.pinned(path):
        keeper.ended((1, 10), path, 0, committed=True)
    assert not path.exists()
    assert not list(tmp_path.glob("free/*"))


def test_a_folder_that_is_broken_is_one_warning(tmp_path: Path) -> None:
    said: list[str] = []
    keeper = Keeper(tmp_path, keep=True, warn=said.append)
    path = put(keeper.own, 10, described=False)
    keeper.began((1, 10), 0, path, {path})
    path.with_suffix(".json").mkdir()  # where its descriptor should go
    descriptor = describe(shard_key(10, 1, 0, 1), path.read_bytes())
    assert not keeper.uploaded(path, descriptor)
    assert not keeper.uploaded(path, descriptor)
    assert len(said) == 1
    assert "not kept here any more" in said[0]


FENCE = Record(kind="fence", seq=1, run="r", attempt=3, step=0, time=0.0)


def test_a_known_log_is_believed_only_by_the_attempt_right_after(tmp_path: Path) -> None:
    write_known(tmp_path, "s3://b/r", "r", [FENCE])
    assert read_known(tmp_path, "s3://b/r", "r", 4) == [FENCE]
    for attempt in (None, 2, 3, 5):
        assert read_known(tmp_path, "s3://b/r", "r", attempt) is None
    assert read_known(tmp_path, "s3://b/r", "other", 4) is None
    assert read_known(tmp_path, "s3://elsewhere/r", "r", 4) is None


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"uri": "s3://b/r", "run": "r"}',
        b'{"uri": "s3://b/r", "run": "r", "records": [1]}', b'{"uri": "s3://b/r", "run": "r", "records": []}',
    ],
)  # fmt: skip
def test_a_known_log_that_is_damaged_is_none(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "log.json").write_bytes(damage)
    assert read_known(tmp_path, "s3://b/r", "r", 4) is None


def test_a_known_record_of_another_run_spoils_the_log(tmp_path: Path) -> None:
    write_known(tmp_path, "s3://b/r", "r", [FENCE])
    data = json.loads((tmp_path / "log.json").read_text())
    data["records"][0]["run"] = "other"
    (tmp_path / "log.json").write_text(json.dumps(data))
    assert read_known(tmp_path, "s3://b/r", "r", 4) is None


@pytest.mark.parametrize("local", [True, False])
def test_without_an_agent_there_is_no_tier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, local: bool
) -> None:
    config = CheckpointConfig(uri="s3://b/x", run="r", local=local)
    tier = open_tier(config, Alone(), tmp_path, {})
    tier.announce([FENCE])
    commit = Record(kind="commit", seq=2, run="r", attempt=3, step=1, time=0.0)
    assert tier.known_records() is None
    assert tier.sources(commit) == []
    assert not list(tmp_path.iterdir())
    assert len(caplog.records) == local
