"""The commit log over a directory: fences, races, pruning, damage."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.errors import StoreConfigError, StoreUnavailable
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.store_local import LocalStore
from trainyard_api.checkpoints import (
    Fenced,
    Record,
    Shard,
    commits_newest_first,
    descriptor_key,
    shard_key,
    step_prefix,
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path.as_uri(), "run-1")


def commit(step: int, attempt: int = 1) -> Record:
    shard = Shard(key=shard_key(step, attempt, 0, 1), rank=0, size=1, sha256="0" * 64)
    return Record(
        kind="commit", seq=0, run="run-1", attempt=attempt, step=step, time=0.0, world_size=1, shards=[shard]
    )


def fence(attempt: int, parent: int = 0) -> Record:
    return Record(kind="fence", seq=0, run="run-1", attempt=attempt, step=0, time=0.0, parent=parent)


def with_data(store: LocalStore, record: Record) -> Record:
    for shard in record.shards:
        store.put(shard.key, b"x")
        store.put(descriptor_key(record.step, record.attempt, 0, 1), b"{}")
    return record


def test_records_are_numbered_without_gaps_and_read_back(store: LocalStore) -> None:
    log = CommitLog(store, "run-1")
    written = [log.append(r) for r in (fence(1), commit(10), commit(20))]
    assert [r.seq for r in written] == [1, 2, 3]
    assert CommitLog(store, "run-1").refresh() == written


def test_an_older_attempt_cannot_commit_after_a_fence(store: LocalStore) -> None:
    old, new = CommitLog(store, "run-1"), CommitLog(store, "run-1")
    old.append(fence(1))
    old.append(commit(10))
    new.append(fence(2, parent=2))
    with pytest.raises(Fenced, match="attempt 2 has begun"):
        old.append(commit(20))
    assert [r.kind for r in new.refresh()] == ["fence", "commit", "fence"]


def test_an_older_attempt_that_knew_the_tail_loses_the_race_for_the_next_number(store: LocalStore) -> None:
    """The fence comes between its look at the log and its write."""
    old, new = CommitLog(store, "run-1"), CommitLog(store, "run-1")
    old.append(fence(1))
    old.refresh()
    new.append(fence(2))
    assert old.try_append(commit(20)) is None
    with pytest.raises(Fenced):
        old.append(commit(20))


def test_a_commit_that_comes_before_the_fence_is_seen_by_the_new_attempt(store: LocalStore) -> None:
    """The commit comes between the new attempt's look at the log and its fence."""
    old, new = CommitLog(store, "run-1"), CommitLog(store, "run-1")
    old.append(fence(1))
    new.refresh()
    old.append(commit(20))
    assert new.try_append(fence(2)) is None
    assert commits_newest_first(new.records)[0].step == 20


def test_one_of_sixteen_writers_wins_each_number(store: LocalStore) -> None:
    logs = [CommitLog(store, "run-1") for _ in range(16)]
    logs[0].append(fence(1))
    start = threading.Barrier(16)
    won: list[int] = []

    def write(number: int) -> None:
        logs[number].refresh()
        start.wait(10)
        if logs[number].try_append(commit(100 + number)) is not None:
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(won) == 1
    assert [r.step for r in CommitLog(store, "run-1").refresh()] == [0, 100 + won[0]]


def test_an_answer_that_was_lost_is_recognised_on_the_second_try(store: LocalStore) -> None:
    """create() succeeded, the connection broke before the answer: the retry finds its own record, and is content."""

    class Lossy(LocalStore):
        lost = False

        def create(self, key: str, data: bytes) -> bool:
            created = super().create(key, data)
            if not self.lost:
                self.lost = True
                raise StoreUnavailable("connection reset")
            return created

    log = CommitLog(Lossy(store.uri.removesuffix("/run-1"), "run-1"), "run-1")
    record = with_retries(lambda: log.append(commit(10)), seconds=5)
    assert record.seq == 1
    assert [r.step for r in CommitLog(store, "run-1").refresh()] == [10]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b'{"kind": "commit", "seq": 2', "delimiter"),
        (b"[]", "expected an object"),
        (b"\xff\xff\x00", "decode"),
        (json.dumps(replace(commit(10), seq=2, run="run-2").to_json()).encode(), "belongs to run run-2"),
        (json.dumps(replace(commit(10), seq=7).to_json()).encode(), "says seq 7"),
        (json.dumps(replace(commit(10), seq=2, version=9).to_json()).encode(), "newer than"),
        (
            json.dumps(replace(commit(10), seq=2).to_json())
            .replace(step_prefix(10, 1), "data/../../")
            .encode(),
            "names a key outside",
        ),
    ],
    ids=[
        "empty",
        "cut",
        "list",
        "not utf-8",
        "other run",
        "other seq",
        "newer version",
        "path out of the run",
    ],
)
def test_a_damaged_record_is_named_and_keeps_its_number(store: LocalStore, content: bytes, why: str) -> None:
    log = CommitLog(store, "run-1")
    log.append(commit(5))
    assert store.create("commits/00000002.json", content)
    records = log.refresh()
    assert [r.step for r in records] == [5]
    assert why in log.unreadable[2]
    assert log.unreadable[2].startswith("commits/00000002.json: ")
    assert log.append(commit(20)).seq == 3


def test_pruning_keeps_the_newest_and_what_an_attempt_may_be_loading(store: LocalStore) -> None:
    log = CommitLog(store, "run-1")
    log.append(fence(1))
    for step in (10, 20, 30):
        log.append(with_data(store, commit(step)))
    log.append(fence(2, parent=2))  # loads step 10
    for step in (40, 50):
        log.append(with_data(store, commit(step, attempt=2)))
    orphan = step_prefix(5, 1) + "shard-00000-of-00001.pt"
    staged = step_prefix(60, 2) + "shard-00000-of-00001.pt"
    for key in (orphan, staged):
        store.put(key, b"x")
    gone = log.prune(keep=2, attempt=2)
    assert [r.step for r in commits_newest_first(CommitLog(store, "run-1").refresh())] == [50, 40, 10]
    left = store.list("data/")
    assert {key.split("/")[1] for key in left} == {f"step-{s:012d}" for s in (10, 40, 50, 60)}
    assert orphan in gone
    assert gone.index("commits/00000003.json") < gone.index(shard_key(20, 1, 0, 1))
    with pytest.raises(Fenced):
        log.prune(keep=2, attempt=1)


def test_whatever_happens_two_commits_stay_loadable(store: LocalStore) -> None:
    """Random saves, prunes, restarts: every commit that is listed has its data, and two are left or all there were."""
    dice = random.Random(5)
    attempt, step, made = 1, 0, 0
    log = CommitLog(store, "run-1")
    log.append(fence(1))
    for _ in range(150):
        action = dice.choice(["save", "save", "lose", "prune", "restart"])
        if action == "save":
            step += dice.randint(1, 5)
            log.append(with_data(store, commit(step, attempt)))
            made += 1
        elif action == "lose":
            with_data(store, commit(step + 1, attempt))
        elif action == "prune":
            log.prune(keep=dice.choice([2, 3]), attempt=attempt)
        else:
            attempt += 1
            log = CommitLog(store, "run-1")
            known = commits_newest_first(log.refresh())
            parent = known[dice.randrange(min(2, len(known)))] if known else None
            step = parent.step if parent else 0
            log.append(fence(attempt, parent.seq if parent else 0))
        commits = commits_newest_first(CommitLog(store, "run-1").refresh())
        assert len(commits) >= min(2, made)
        assert all(store.get(s.key) for r in commits for s in r.shards)


def test_a_file_in_the_way_is_a_matter_of_configuration(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    store = LocalStore(blocked.as_uri(), "run-1")
    with pytest.raises(StoreConfigError, match="not a directory"):
        store.put("commits/x", b"")
