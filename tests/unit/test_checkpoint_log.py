"""The commit log over a directory: fences, races, pruning, damage."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.config import KeepBest
from trainyard.checkpoint.errors import StoreConfigError, StoreUnavailable
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.store_local import LocalStore
from trainyard_api.checkpoints import (
    Fenced,
    Record,
    Shard,
    commit_key,
    commits_newest_first,
    descriptor_key,
    order,
    prunable,
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


def test_the_best_are_kept_and_of_equals_the_newest() -> None:
    def logged(step: int, **metrics: float) -> Record:
        return replace(commit(step), seq=step, metrics=metrics)

    records = [
        logged(1, loss=0.1),
        logged(2),
        logged(3, loss=0.3),
        logged(4, loss=0.1),
        logged(5, loss=0.9),
        logged(6),
    ]
    gone = {r.step for r in prunable(records, keep=2, keep_best=("loss", "min", 1))}
    assert gone == {1, 2, 3}
    assert {r.step for r in prunable(records, keep=2, keep_best=("loss", "min", 2))} == {2, 3}
    assert {r.step for r in prunable(records, keep=2, keep_best=("loss", "max", 2))} == {1, 2, 4}
    assert {r.step for r in prunable(records, keep=2, keep_best=("never", "max", 2))} == {1, 2, 3, 4}
    assert {r.step for r in prunable(records, keep=2)} == {1, 2, 3, 4}
    assert {r.step for r in prunable(records, keep=1)} == {1, 2, 3, 4}, "two at least"


def test_fences_below_all_commits_go_and_the_newest_stays(store: LocalStore) -> None:
    log = CommitLog(store, "run-1")
    for attempt in (1, 2, 3):
        log.append(fence(attempt))
    for step in (10, 20):
        log.append(commit(step, attempt=3))
    log.append(fence(4, parent=5))
    log.append(commit(30, attempt=4))
    log.prune(keep=2, attempt=4)
    assert [(r.kind, r.attempt) for r in CommitLog(store, "run-1").refresh()] == [
        ("commit", 3), ("fence", 4), ("commit", 4),
    ]  # fmt: skip
    empty = CommitLog(LocalStore(store.uri, "other"), "run-1")
    for attempt in (1, 2, 3):
        empty.append(fence(attempt))
    assert empty.prune(keep=2, attempt=3) == []


def test_a_number_that_was_pruned_does_not_let_an_old_attempt_commit(store: LocalStore) -> None:
    old, new = CommitLog(store, "run-1"), CommitLog(store, "run-1")
    old.append(fence(1))
    old.refresh()
    new.append(fence(2))  # the number that the old one will take for free
    for step in (10, 20, 30):
        new.append(commit(step, attempt=2))
    new.append(fence(3, parent=5))
    new.append(commit(40, attempt=3))
    new.prune(keep=2, attempt=3)
    assert store.list("commits/") == [f"commits/0000000{n}.json" for n in (5, 6, 7)]
    with pytest.raises(Fenced, match="attempt 3 has begun"):
        old.try_append(commit(11))
    assert commits_newest_first(CommitLog(store, "run-1").refresh())[0].step == 40
    new.prune(keep=2, attempt=3)
    assert [r.step for r in commits_newest_first(CommitLog(store, "run-1").refresh())] == [40, 30]


def test_the_data_of_a_record_that_cannot_be_read_are_no_orphans(store: LocalStore) -> None:
    log = CommitLog(store, "run-1")
    log.append(fence(1))
    for step in (10, 20, 30):
        log.append(with_data(store, commit(step)))
    log.append(fence(2, parent=4))
    for step in (40, 50):
        log.append(with_data(store, commit(step, attempt=2)))
    store.put("commits/00000003.json", b"{")  # step 20
    log = CommitLog(store, "run-1")
    log.prune(keep=4, attempt=2)
    assert store.get(shard_key(20, 1, 0, 1)) == b"x"
    for step in (60, 70):
        log.append(with_data(store, commit(step, attempt=2)))
    log.prune(keep=2, attempt=2)
    assert not log.unreadable, "below all that is kept it is of no use"
    assert {key.split("/")[1] for key in store.list("data/")} == {f"step-{s:012d}" for s in (30, 60, 70)}


def test_unfinished_uploads_of_saves_that_are_over_are_freed_and_no_others(
    store: LocalStore, tmp_path: Path
) -> None:
    log = CommitLog(store, "run-1")
    log.append(fence(1))
    log.append(with_data(store, commit(10)))
    log.append(fence(2, parent=2))
    for step in (20, 30, 40):
        log.append(with_data(store, commit(step, attempt=2)))
    names = [
        step_prefix(10, 1) + ".a.tmp", step_prefix(99, 1) + ".b.tmp", step_prefix(25, 2) + ".c.tmp",
        step_prefix(40, 2) + ".d.tmp",
    ]  # fmt: skip
    alive = [step_prefix(35, 2) + ".e.tmp", step_prefix(50, 2) + ".f.tmp", step_prefix(5, 3) + ".g.tmp"]
    old = step_prefix(51, 2) + ".h.tmp"
    for name in [*names, *alive, old]:
        store.put(name, b"part")
    (tmp_path / "run-1" / old).touch()
    long_ago = time.time() - 25 * 3600
    os.utime(tmp_path / "run-1" / old, (long_ago, long_ago))
    gone = log.prune(keep=3, attempt=2)
    assert set(names) | {old} <= set(gone)
    assert {found.key for found in store.leftovers()} == set(alive)


def test_known_records_are_believed_only_by_the_attempt_that_follows(store: LocalStore) -> None:
    first = CommitLog(store, "run-1")
    first.append(fence(1))
    made = first.append(commit(10))
    known = first.records

    class Counting(LocalStore):
        lists = 0

        def list(self, prefix: str) -> list[str]:
            self.lists += 1
            return super().list(prefix)

    counting = Counting(store.uri.removesuffix("/run-1"), "run-1")
    assert CommitLog(counting, "run-1", known).try_append(fence(2, parent=made.seq)) is not None
    assert counting.lists == 0
    assert CommitLog(counting, "run-1", known).try_append(fence(3, parent=made.seq)) is None
    assert counting.lists == 1


# ---- whatever happens


class Lives(RuleBasedStateMachine):
    """Random saves, deaths, damage, prunes and restarts, also at the same time, on a real directory.

    Two commits that can be loaded are kept, or all there were; nothing that a commit names is ever deleted; a save that is
    under way is let alone; the newest commit never is of an older attempt than the newest acknowledged one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="trainyard-lives-")
        self.store = LocalStore(Path(self.folder.name).as_uri(), "run-1")
        self.attempt = 0
        self.step = 0
        self.logs: dict[int, CommitLog] = {}
        """By attempt: processes that live, zombies too."""
        self.committed: list[Record] = []
        self.damaged: set[str] = set()
        self.under_way: dict[int, Record] = {}
        """By attempt: data are there, the record is not."""
        self.restart(0)

    @rule(back=st.integers(0, 2))
    def restart(self, back: int) -> None:
        """A new attempt, from one of the newest commits: those before it may be damaged."""
        log = CommitLog(self.store, "run-1")
        commits = commits_newest_first(log.refresh())
        self.attempt += 1
        start = commits[min(back, len(commits) - 1)] if commits else None
        self.step = start.step if start else 0
        assert log.try_append(fence(self.attempt, start.seq if start else 0)) is not None
        self.logs[self.attempt] = log

    @rule()
    def resume_together(self) -> None:
        """Two attempts begin at once: both have read the log before either writes its fence."""
        logs = [CommitLog(self.store, "run-1") for _ in range(2)]
        commits = [commits_newest_first(log.refresh()) for log in logs]
        older, newer = self.attempt + 1, self.attempt + 2
        parent = commits[0][0] if commits[0] else None
        number = parent.seq if parent else 0
        assert logs[1].try_append(fence(newer, number)) is not None
        assert logs[0].try_append(fence(older, number)) is None
        with pytest.raises(Fenced):
            logs[0].append(fence(older, number))
        self.attempt, self.step = newer, parent.step if parent else 0
        self.logs[newer] = logs[1]

    @rule(data=st.data(), forward=st.integers(1, 5))
    def stage(self, data: st.DataObject, forward: int) -> None:
        """A save begins; what its attempt had under way is given up, as by a death."""
        attempt = data.draw(st.sampled_from(sorted(self.logs)))
        if attempt == self.attempt:
            self.step += forward
            self.under_way[attempt] = with_data(self.store, commit(self.step, attempt))
        else:
            self.under_way[attempt] = with_data(self.store, commit(1000 + forward, attempt))

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if not self.under_way:
            return
        attempt = data.draw(st.sampled_from(sorted(self.under_way)))
        record = self.under_way.pop(attempt)
        if attempt == self.attempt:
            self.committed.append(self.logs[attempt].append(record))
        else:
            with pytest.raises(Fenced):
                self.logs[attempt].append(record)

    @rule(data=st.data(), keep=st.integers(1, 4), best=st.booleans())
    def prune(self, data: st.DataObject, keep: int, best: bool) -> None:
        attempt = data.draw(st.sampled_from(sorted(self.logs)))
        keep_best = KeepBest(metric="loss", mode="min", count=2) if best else None
        if attempt == self.attempt:
            self.logs[attempt].prune(keep=keep, attempt=attempt, keep_best=keep_best)
        else:
            with pytest.raises(Fenced):
                self.logs[attempt].prune(keep=keep, attempt=attempt, keep_best=keep_best)

    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        """A record becomes unreadable. Not the last two: then there is nothing to promise."""
        keys = [k for k in self.store.list("commits/") if k not in self.damaged]
        newest = {commit_key(r.seq) for r in self.committed[-2:]}
        fences = {commit_key(r.seq) for r in CommitLog(self.store, "run-1").refresh() if r.kind == "fence"}
        keys = [k for k in keys if k not in newest | fences]
        if keys:
            key = data.draw(st.sampled_from(keys))
            self.store.put(key, b"{")
            self.damaged.add(key)

    @invariant()
    def holds(self) -> None:
        records = CommitLog(self.store, "run-1").refresh()
        commits = commits_newest_first(records)
        assert len(commits) >= min(2, len(self.committed))
        assert [order(r) for r in commits[:2]] == [order(r) for r in reversed(self.committed[-2:])]
        for record in commits:
            for shard in record.shards:
                assert self.store.get(shard.key) == b"x"
                self.store.get(descriptor_key(record.step, record.attempt, 0, 1))
        fences = [r for r in records if r.kind == "fence"]
        newest = max(fences, key=order)
        assert newest.attempt == self.attempt
        seqs = {r.seq for r in commits} | {int(key[8:16]) for key in self.damaged}
        assert newest.parent in seqs | {0}, "what an attempt began from is kept while it is the newest"
        if self.attempt in self.under_way:
            assert self.store.get(self.under_way[self.attempt].shards[0].key) == b"x"

    def teardown(self) -> None:
        self.folder.cleanup()


TestWhateverHappens = Lives.TestCase
TestWhateverHappens.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_file_in_the_way_is_a_matter_of_configuration(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    store = LocalStore(blocked.as_uri(), "run-1")
    with pytest.raises(StoreConfigError, match="not a directory"):
        store.put("commits/x", b"")
