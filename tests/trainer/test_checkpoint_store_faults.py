"""The S3 store and the commit log over it, through all faults that the proxy can make, with a real server behind it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from devcluster.s3 import S3Server
from tests.fakes.s3_proxy import S3Proxy
from trainyard.checkpoint import retry, s3_client, store_s3
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.errors import ShardInvalid, StoreConfigError, StoreUnavailable
from trainyard.checkpoint.format.digest import digest, spans
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.store_s3 import S3Store
from trainyard_api.checkpoints import Fenced, Record, Shard, commits_newest_first, shard_key

PART = 5 << 20
SHARD = "data/step-000000000010/a000001/shard-00000-of-00001.safetensors"


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    with S3Proxy(s3.access) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: S3Proxy, prefix: str, s3_credentials: None) -> S3Store:
    return S3Store(prefix, "run-1", endpoint=proxy.url)


@pytest.fixture
def behind(prefix: str, s3: S3Server, s3_credentials: None) -> S3Store:
    """The same objects, past the proxy."""
    return S3Store(prefix, "run-1", endpoint=s3.endpoint)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients that take a server for silent after a second."""
    monkeypatch.setattr(s3_client, "READ_SECONDS", 1.0)
    s3_client.client.cache_clear()
    yield
    s3_client.client.cache_clear()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of five parts, the last one small."""
    path = tmp_path / "staged"
    path.write_bytes(os.urandom(4 * PART + 1234))
    return path


def digests(file: Path) -> list[str]:
    content = file.read_bytes()
    return [digest(content[begin:end]) for begin, end in spans(len(content), PART)]


def commit(step: int, attempt: int = 1) -> Record:
    shard = Shard(key=shard_key(step, attempt, 0, 1), rank=0, size=1, sha256="0" * 64)
    return Record(
        kind="commit", seq=0, run="run-1", attempt=attempt, step=step, time=0.5, world_size=1, shards=[shard]
    )


def fence(attempt: int, parent: int = 0) -> Record:
    return Record(kind="fence", seq=0, run="run-1", attempt=attempt, step=0, time=0.5, parent=parent)


def steps(store: S3Store) -> list[int]:
    return [r.step for r in commits_newest_first(CommitLog(store, "run-1").refresh())]


# ---- uploads


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "error", "status": 500, "code": "InternalError", "times": 3},
        {"kind": "error", "status": 400, "code": "RequestTimeout", "times": 2},
        {"kind": "reset_upload", "at": 0, "times": 2},
        {"kind": "reset_upload", "at": 100_000, "times": 3},
        {"kind": "reset_upload", "at": PART - 1, "times": 1},
        {"kind": "lose_answer", "times": 3},
        {"kind": "cut_answer", "at": 0, "times": 1},
    ],
    ids=lambda fault: "-".join(str(value) for value in fault.values()),
)
def test_a_part_that_fails_is_sent_again_and_the_object_is_whole(
    proxy: S3Proxy, store: S3Store, behind: S3Store, file: Path, fault: dict[str, object]
) -> None:
    with proxy.fault(method="PUT", path="partNumber=", **fault):  # type: ignore[arg-type]
        assert store.put_parts(SHARD, file, PART) == digests(file)
    assert proxy.fired[str(fault["kind"])] == fault["times"]
    assert behind.get(SHARD) == file.read_bytes()
    assert not behind.leftovers()


def test_a_completion_whose_answer_is_lost_is_found_to_be_done(
    proxy: S3Proxy, store: S3Store, behind: S3Store, file: Path
) -> None:
    with proxy.fault("lose_answer", method="POST", path="uploadId=", times=2):
        assert store.put_parts(SHARD, file, PART) == digests(file)
    assert proxy.fired["lose_answer"] == 2
    assert behind.get(SHARD) == file.read_bytes()


def test_a_completion_is_found_to_be_done_by_the_last_try_too(
    proxy: S3Proxy, store: S3Store, behind: S3Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock() -> float:
        """The time is over when the second try is answered."""
        return float("inf") if proxy.count("POST", "uploadId=") > 1 else 0.0

    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    # As S3 says; versitygw answers as if it had completed it again.
    gone = {"status": 404, "code": "NoSuchUpload"}
    with (
        proxy.fault("lose_answer", method="POST", path="uploadId=", times=1),
        proxy.fault("error", method="POST", path="uploadId=", skip=1, times=1, **gone),
    ):
        assert store.put_parts(SHARD, file, PART) == digests(file)
    assert (proxy.fired["lose_answer"], proxy.fired["error"]) == (1, 1)
    assert behind.get(SHARD) == file.read_bytes()


def test_a_time_out_in_the_middle_of_a_put(
    impatient: None, proxy: S3Proxy, behind: S3Store, prefix: str, file: Path
) -> None:
    store = S3Store(prefix, "run-1", endpoint=proxy.url)
    with proxy.fault("stall", method="PUT", path="partNumber=2", at=PART // 2, times=1):
        assert store.put_parts(SHARD, file, PART) == digests(file)
    assert proxy.fired["stall"] == 1
    with proxy.fault("stall", method="PUT", path="small", at=1, times=1), pytest.raises(StoreUnavailable):
        store.put("small", b"1234")
    assert behind.get(SHARD) == file.read_bytes()
    assert behind.list("small") == []


def test_an_upload_that_is_given_up_leaves_nothing(
    proxy: S3Proxy, store: S3Store, behind: S3Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_s3, "_PART_SECONDS", 0.5)
    with (
        proxy.fault("reset_upload", method="PUT", path="partNumber=3", at=1000),
        pytest.raises(StoreUnavailable),
    ):
        store.put_parts(SHARD, file, PART)
    assert behind.list("") == []
    assert not behind.leftovers()
    assert store.put_parts(SHARD, file, PART) == digests(file)


@pytest.mark.parametrize(("part", "at"), [(5, 0), (2, 100_000), (2, PART - 1)])
def test_an_upload_that_somebody_else_aborts_is_told_at_once_and_works_the_next_time(
    proxy: S3Proxy, store: S3Store, behind: S3Store, file: Path, part: int, at: int
) -> None:
    """Also where a part is still on its way: versitygw then brings half of the upload back, and cannot complete it."""

    def abort() -> None:
        for leftover in behind.leftovers():
            behind.abort(leftover)

    with proxy.fault("at_byte", method="PUT", path=f"partNumber={part}", at=at, times=1, then=abort):
        assert with_retries(lambda: store.put_parts(SHARD, file, PART), seconds=20) == digests(file)
    assert proxy.count("POST", "uploads") == 2
    assert behind.get(SHARD) == file.read_bytes()


def test_an_upload_whose_parts_all_come_back_after_an_abort_is_begun_anew(
    s3: S3Server, proxy: S3Proxy, store: S3Store, behind: S3Store, file: Path
) -> None:
    """With all parts on their way, versitygw brings all of them back, but not what it noted of the upload in attributes."""

    def forget() -> None:
        for folder in s3.data_dir.glob("*/.sgwtmp/multipart/*/*"):
            for name in os.listxattr(folder):
                os.removexattr(folder, name)

    with proxy.fault("at_byte", method="PUT", path="partNumber=5", at=0, times=1, then=forget):
        assert with_retries(lambda: store.put_parts(SHARD, file, PART), seconds=20) == digests(file)
    assert proxy.count("POST", "uploads") == 2
    assert behind.get(SHARD) == file.read_bytes()


def test_permission_that_is_withdrawn_is_an_error_of_configuration(
    proxy: S3Proxy, store: S3Store, file: Path
) -> None:
    denied = {"status": 403, "code": "AccessDenied"}
    with (
        proxy.fault("error", method="PUT", path="partNumber=2", **denied),
        pytest.raises(StoreConfigError, match="no permission for UploadPart"),
    ):
        store.put_parts(SHARD, file, PART)
    assert proxy.count("PUT", "partNumber=2") == 1
    with (
        proxy.fault("error", method="GET", **denied),
        pytest.raises(StoreConfigError, match="no permission for GetObject"),
    ):
        store.get(SHARD)


# ---- SlowDown


def test_slow_down_is_honoured(proxy: S3Proxy, store: S3Store, behind: S3Store, file: Path) -> None:
    with proxy.fault("error", method="PUT", path="partNumber=", times=4):
        assert store.put_parts(SHARD, file, PART) == digests(file)
    assert proxy.fired["error"] == 4
    assert store._pace.allowed < store_s3.WORKERS
    assert behind.get(SHARD) == file.read_bytes()


def test_retry_after_is_waited_for_and_not_only_by_the_request_that_was_told(
    proxy: S3Proxy, store: S3Store, file: Path
) -> None:
    with proxy.fault("error", method="PUT", path="partNumber=1", retry_after="2", times=1):
        store.put_parts(SHARD, file, PART)
    first = [s.at for s in proxy.seen if "partNumber=1" in s.path]
    assert len(first) == 2
    assert first[1] - first[0] >= 2.0
    later = [s.at for s in proxy.seen if s.at > first[0] + 0.5]
    assert all(at - first[0] >= 2.0 for at in later)


def test_an_error_says_that_the_server_is_busy_and_for_how_long(proxy: S3Proxy, store: S3Store) -> None:
    with (
        proxy.fault("error", retry_after="7"),
        pytest.raises(StoreUnavailable, match="fewer requests") as raised,
    ):
        store.get("x")
    assert raised.value.slow_down
    assert raised.value.retry_after == 7.0
    then = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    with proxy.fault("error", retry_after=then), pytest.raises(StoreUnavailable) as raised:
        store.get("x")
    assert raised.value.retry_after is not None
    assert 90 < raised.value.retry_after <= 100
    with proxy.fault("error", retry_after="soon"), pytest.raises(StoreUnavailable) as raised:
        store.get("x")
    assert raised.value.retry_after is None


# ---- reads


def test_an_answer_that_is_cut_short_is_worth_another_try(
    proxy: S3Proxy, store: S3Store, behind: S3Store
) -> None:
    content = os.urandom(3 << 20)
    behind.put(SHARD, content)
    buffer = bytearray(2 << 20)
    for at in (0, 1, 1_000_000, (2 << 20) - 1):
        with proxy.fault("cut_answer", method="GET", at=at, times=1):
            with pytest.raises(StoreUnavailable):
                store.read_into(SHARD, 1 << 20, memoryview(buffer))
            store.read_into(SHARD, 1 << 20, memoryview(buffer))
        assert buffer == content[1 << 20 :]
        with proxy.fault("cut_answer", method="GET", at=at, times=1), pytest.raises(StoreUnavailable):
            store.get(SHARD)
    assert proxy.fired["cut_answer"] == 8


def test_an_object_that_was_cut_short_is_damaged_for_good(store: S3Store, behind: S3Store) -> None:
    behind.put(SHARD, b"x" * 1000)
    with pytest.raises(ShardInvalid):
        store.read_into(SHARD, 0, memoryview(bytearray(1001)))


def test_a_flipped_bit_in_a_record_is_noticed_and_the_record_read_again(
    proxy: S3Proxy, store: S3Store, behind: S3Store
) -> None:
    """Any bit: of a number, too, which would still be JSON."""
    CommitLog(behind, "run-1").append(commit(1234567))
    size = len(behind.get("commits/00000001.json"))
    for at in range(0, size, 11):
        with proxy.fault("flip", method="GET", path="commits/00000001.json$", at=at, bit=at % 7, times=1):
            (record,) = CommitLog(store, "run-1").refresh()
            assert record.step == 1234567
        with proxy.fault("flip", method="GET", path="commits/00000001.json$", at=at, bit=at % 7):
            log = CommitLog(store, "run-1")
            damaged = log.refresh()
            # White space, or the name of the checksum, may change without harm.
            assert damaged == [] or damaged == [record]
            assert list(log.unreadable) == ([] if damaged else [1])
    assert proxy.fired["flip"] > size // 11


# ---- the commit log


@pytest.mark.parametrize("kind", ["lose_answer", "reset_upload", "error"])
def test_a_commit_is_made_once_whatever_becomes_of_the_answer(
    proxy: S3Proxy, store: S3Store, behind: S3Store, kind: str
) -> None:
    log = CommitLog(store, "run-1")
    log.append(fence(1))
    for step in (10, 20, 30):
        with proxy.fault(kind, method="PUT", path="commits/", times=2, status=500, code="InternalError"):
            record = with_retries(lambda: log.append(commit(step)), seconds=20)  # noqa: B023
        assert record.step == step
    assert proxy.fired[kind] >= 3
    assert steps(behind) == [30, 20, 10]
    assert behind.list("commits/") == [f"commits/0000000{n}.json" for n in (1, 2, 3, 4)]


def test_a_stale_listing_neither_loses_a_commit_nor_lets_an_old_attempt_write(
    proxy: S3Proxy, store: S3Store, behind: S3Store
) -> None:
    old, fresh = CommitLog(store, "run-1"), CommitLog(behind, "run-1")
    old.append(fence(1))
    old.append(commit(10))
    with proxy.fault("stale_list"):
        assert old.append(commit(20)).seq == 3
        assert [r.step for r in old.refresh()] == [0, 10, 20]
        late = CommitLog(store, "run-1")
        assert [r.step for r in late.refresh()] == [0, 10]
        assert late.try_append(fence(2, parent=2)) is None, "it would begin from step 10, and 20 is there"
        assert [r.step for r in late.records] == [0, 10, 20]
        fresh.append(fence(3, parent=3))
        with pytest.raises(Fenced, match="attempt 3 has begun"):
            old.append(commit(30))
        with pytest.raises(Fenced):
            late.append(fence(2, parent=3))
    assert proxy.fired["stale_list"] > 3
    assert [r.kind for r in fresh.refresh()] == ["fence", "commit", "commit", "fence"]


def test_with_a_stale_listing_nothing_is_deleted_that_a_commit_names(
    proxy: S3Proxy, store: S3Store, behind: S3Store
) -> None:
    first = CommitLog(store, "run-1")
    first.append(fence(1))
    for step in (10, 20, 30):
        behind.put(shard_key(step, 1, 0, 1), b"x")
    for step in (10, 20):
        first.append(commit(step))
    CommitLog(behind, "run-1").append(commit(30))
    CommitLog(behind, "run-1").append(fence(2, parent=4))
    with proxy.fault("stale_list", path="commits"):
        CommitLog(store, "run-1").prune(keep=2, attempt=2)
    assert proxy.fired["stale_list"] == 1
    assert steps(behind) == [30, 20]
    assert behind.list("data/") == [shard_key(20, 1, 0, 1), shard_key(30, 1, 0, 1)]


def test_known_records_spare_the_listing(proxy: S3Proxy, store: S3Store, behind: S3Store) -> None:
    before = CommitLog(behind, "run-1")
    before.append(fence(1))
    made = before.append(commit(10))
    log = CommitLog(store, "run-1", before.records)
    assert log.try_append(fence(2, parent=made.seq)) is not None
    assert proxy.count("GET") == 0
    stale = CommitLog(store, "run-1", before.records)
    assert stale.try_append(fence(3, parent=made.seq)) is None, (
        "there was an attempt in between: it looks first"
    )
    assert proxy.count("GET", "list-type") == 1
    assert stale.try_append(fence(3, parent=made.seq)) is not None


# ---- a server without conditional writes


@pytest.fixture(params=["ignored", "refused"])
def plain(request: pytest.FixtureRequest, proxy: S3Proxy, store: S3Store) -> S3Store:
    """Seen through a proxy that takes conditions from it: either it ignores them, or it says that it does not know them."""
    if request.param == "ignored":
        proxy.fault("unconditional")
    else:
        proxy.fault("error", method="PUT", path="probe/", status=501, code="NotImplemented")
    return store


def test_the_log_without_conditional_writes(
    plain: S3Store, behind: S3Store, caplog: pytest.LogCaptureFixture
) -> None:
    assert not plain.conditional
    old, new = CommitLog(plain, "run-1"), CommitLog(plain, "run-1")
    old.append(fence(1))
    old.append(commit(10))
    known = new.refresh()
    old.append(commit(20))
    assert new.try_append(fence(2, parent=known[-1].seq)) is None, "a commit came meanwhile"
    assert [r.step for r in new.refresh()] == [0, 10, 20]
    assert new.try_append(fence(2, parent=3)) is not None
    with pytest.raises(Fenced, match="attempt 2 has begun"):
        old.append(commit(30))
    new.append(commit(40, attempt=2))
    assert steps(plain) == [40, 20, 10]
    assert [r.step for r in CommitLog(plain, "run-1").refresh()] == [0, 10, 20, 0, 40]
    assert len({key.split(".")[1] for key in behind.list("commits/")}) == 5
    assert sum("does not honour If-None-Match" in r.getMessage() for r in caplog.records) == 1


def test_without_conditional_writes_a_lost_answer_makes_no_second_record(
    proxy: S3Proxy, plain: S3Store, behind: S3Store
) -> None:
    log = CommitLog(plain, "run-1")
    log.append(fence(1))
    with proxy.fault("lose_answer", method="PUT", path="commits/", times=2):
        with_retries(lambda: log.append(commit(10)), seconds=20)
    with proxy.fault(
        "error", method="GET", path="list-type", skip=1, status=500, code="InternalError", times=1
    ):
        with_retries(lambda: log.append(commit(20)), seconds=20)
    assert proxy.fired["error"] >= 1
    assert steps(plain) == [20, 10]
    assert len(behind.list("commits/")) == 3


def test_without_conditional_writes_pruning_is_the_same(plain: S3Store, behind: S3Store) -> None:
    log = CommitLog(plain, "run-1")
    log.append(fence(1))
    for step in (10, 20, 30, 40):
        behind.put(shard_key(step, 1, 0, 1), b"x")
        log.append(commit(step))
    log.prune(keep=2, attempt=1)
    assert steps(plain) == [40, 30]
    assert behind.list("data/") == [shard_key(30, 1, 0, 1), shard_key(40, 1, 0, 1)]
    assert log.append(commit(50)).seq == 6
