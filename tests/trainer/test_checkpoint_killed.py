"""SIGKILL at random bytes of uploads, and writers that come back from the dead: nothing acknowledged is lost, nothing that is
loaded is wrong."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from devcluster.s3 import S3Server
from tests.fakes.s3_proxy import S3Proxy
from tests.trainer.forkhost import Host, Rank
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.store_s3 import S3Store
from trainyard_api.checkpoints import commits_newest_first

pytestmark = pytest.mark.usefixtures("s3_credentials")
SCRIPT = str(Path(__file__).with_name("crash_saver.py"))
KILLS = 100
SEED = 20261123
WHERE = (
    "data/.*partNumber",
    "data/.*partNumber",
    "data/.*partNumber",
    r"data/.*\.json",
    "commits/",
    "data/.*uploadId",
)
"""In what request it happens: a part mostly; a descriptor, a commit record, or the completion of an upload."""


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    with S3Proxy(s3.access) as made:
        yield made


def children(pid: int) -> list[int]:
    """Of all its threads: whichever started them."""
    found = []
    with suppress(OSError):  # it may end at any moment
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found


def hit(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    return False


def gone(pids: list[int], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < end, f"processes {left} are there after {seconds:g} s"
        time.sleep(0.02)


def test_a_hundred_kills_at_random_bytes_lose_nothing_that_was_acknowledged(
    host: Host, s3: S3Server, proxy: S3Proxy, prefix: str, tmp_path: Path
) -> None:
    """One run of 101 lives. Each goes on from the newest commit there is, whole, and never from before an acknowledged one."""
    rng = random.Random(SEED)
    file = tmp_path / "acknowledged"
    argv = [SCRIPT, prefix, proxy.url, "run-1", str(file)]
    codes: Counter[int | None] = Counter()
    fired = 0
    for kill in range(KILLS):
        where, only_worker = rng.choice(WHERE), rng.random() < 0.2
        struck = threading.Event()
        lives: list[Rank] = []

        def strike(
            only_worker: bool = only_worker, lives: list[Rank] = lives, struck: threading.Event = struck
        ) -> None:
            worker = lives[0].pid
            hit([worker] if only_worker else [*children(worker), worker], signal.SIGKILL)
            struck.set()

        at = rng.randrange(16 << 20) if "partNumber" in where else rng.randrange(200)
        method = "POST" if "uploadId" in where else "PUT"
        with proxy.fault(
            "at_byte", method=method, path=where, skip=rng.randrange(3), at=at, times=1, then=strike
        ):
            lives += host.start([*argv, "5"], env=s3.environment)
            (life,) = lives
            uploaders: set[int] = set()
            end = time.monotonic() + 60
            while life.code is None and time.monotonic() < end:
                uploaders.update(children(life.pid))
                host.poll(0.02)
            assert life.code is not None, f"life {kill} hangs: {life.output[-2000:]}"
        fired += struck.is_set()
        codes[life.code] += 1
        assert life.code in (0, -signal.SIGKILL), f"life {kill}, {where} at {at}: {life.output[-3000:]}"
        gone(sorted(uploaders))  # what was staged is finished by then; it could fence nobody off
    assert fired == KILLS, f"{fired} of {KILLS} kills happened: {codes}"
    (last,) = host.run([*argv, "2"], env=s3.environment)
    assert last.code == 0, last.output
    steps = [int(line) for line in file.read_text().split()]
    assert steps == sorted(set(steps)), "a step was acknowledged twice, or out of order"
    store = S3Store(prefix, "run-1")
    log = CommitLog(store, "run-1")
    commits = commits_newest_first(log.refresh())
    assert commits[0].step == steps[-1]
    assert not log.unreadable
    # Data of dead saves goes with the commits that it is older than; what is left belongs to the newest ones.
    newest = {shard.key for commit in commits for shard in commit.shards}
    left = {key for key in store.list("data/") if key.endswith(".safetensors")}
    assert newest <= left
    assert len(left - newest) <= 3, sorted(left - newest)


def test_a_writer_that_comes_back_commits_nothing(
    host: Host, s3: S3Server, proxy: S3Proxy, prefix: str, tmp_path: Path
) -> None:
    """Stopped in the middle of an upload, it sleeps through a newer attempt, and wakes up."""
    rng = random.Random(SEED)
    file = tmp_path / "acknowledged"
    argv = [SCRIPT, prefix, proxy.url, "run-1", str(file)]
    store = S3Store(prefix, "run-1")
    for life in range(4):
        zombies: list[Rank] = []
        asleep: list[int] = []
        stopped = threading.Event()

        def stop(
            zombies: list[Rank] = zombies, asleep: list[int] = asleep, stopped: threading.Event = stopped
        ) -> None:
            asleep.extend([zombies[0].pid, *children(zombies[0].pid)])
            hit(asleep, signal.SIGSTOP)
            stopped.set()

        try:
            where = ("data/.*partNumber", r"data/.*\.json", "commits/", "data/.*partNumber")[life]
            at = rng.randrange(16 << 20) if "partNumber" in where else 1
            with proxy.fault("at_byte", method="PUT", path=where, skip=1, at=at, times=1, then=stop):
                zombies += host.start([*argv, "5"], env=s3.environment)
                assert stopped.wait(60), zombies[0].output
            (newer,) = host.run([*argv, "2"], env=s3.environment)
            assert newer.code == 0, newer.output
            attempt = max(r.attempt for r in CommitLog(store, "run-1").refresh())
            hit(asleep, signal.SIGCONT)
            host.wait(zombies, 60)
        finally:
            hit(asleep, signal.SIGCONT)
        assert zombies[0].code == 79, zombies[0].output
        assert f"attempt {attempt} has begun" in zombies[0].output
        newest = commits_newest_first(CommitLog(store, "run-1").refresh())[0]
        assert newest.attempt == attempt
        gone(asleep)
    (last,) = host.run([*argv, "1"], env=s3.environment)
    assert last.code == 0, last.output
