"""Without an agent: the uploader is a child of its worker, and sees through what is staged whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devcluster.s3 import S3Server
from tests.fakes.s3_proxy import S3Proxy
from tests.trainer.forkhost import PYTHONPATH, ROOT
from tests.trainer.tier_nodes import until
from trainyard.checkpoint import staging
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.messages import Outcome, Staged, from_line
from trainyard.checkpoint.store_s3 import S3Store
from trainyard_api.checkpoints import Record, commits_newest_first, shard_key

pytestmark = pytest.mark.usefixtures("s3_credentials")


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    with S3Proxy(s3.access) as proxy:
        yield proxy


@pytest.fixture
def store(prefix: str) -> S3Store:
    return S3Store(prefix, "run-1")


class Worker:
    """A worker process, and what it says."""

    def __init__(self, uri: str, endpoint: str, folder: Path) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TRAINYARD_")}
        self.log = folder / "stderr"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/trainer/child_worker.py"), uri, endpoint], stdout=subprocess.PIPE,
                stderr=log, env={**env, "PYTHONPATH": PYTHONPATH, "TMPDIR": str(folder)},
            )  # fmt: skip
        first = self.said()
        self.staging, self.child = Path(first["staging"]), int(first["child"])

    def said(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@pytest.fixture
def worker(prefix: str, proxy: S3Proxy, tmp_path: Path) -> Iterator[Worker]:
    """Its save cannot be uploaded until the faults are cleared, but it is on its way."""
    proxy.fault("error", method="PUT", path="/data/")
    worker = Worker(prefix, proxy.url, tmp_path)
    until(lambda: [seen for seen in proxy.seen if "/data/" in seen.path])
    yield worker
    for pid in (worker.process.pid, worker.child):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    worker.process.wait(20)
    assert worker.process.stdout is not None
    worker.process.stdout.close()


def alive(pid: int) -> bool:
    """And no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def committed(store: S3Store) -> list[int]:
    return [record.step for record in commits_newest_first(CommitLog(store, "run-1").refresh())]


def test_what_is_staged_is_committed_though_the_worker_was_killed(
    worker: Worker, proxy: S3Proxy, store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker.process.kill()
    worker.process.wait(20)
    until(lambda: "the worker is gone; its 1 staged shards get up to 300 s" in worker.log.read_text())
    monkeypatch.setattr(staging, "_YOUNG_SECONDS", 0)
    staging._sweep(tmp_path, staging._PREFIX)
    assert worker.staging.exists(), "the next process here takes it for abandoned"
    assert committed(store) == []
    proxy.clear()
    until(lambda: committed(store) == [10], 60)
    until(lambda: not alive(worker.child))
    assert not worker.staging.exists()


def test_an_uploader_that_is_killed_is_replaced(worker: Worker, proxy: S3Proxy, store: S3Store) -> None:
    os.kill(worker.child, signal.SIGKILL)
    until(lambda: "starting another one" in worker.log.read_text())
    proxy.clear()
    assert worker.said()["op"] == "committed"
    assert worker.process.wait(30) == 0
    assert committed(store) == [10]
    assert not worker.staging.exists()
    until(lambda: not children_in(worker.staging))


def children_in(folder: Path) -> list[str]:
    """Processes that have the folder on their command line."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in line.read_bytes():
                found.append(line.parent.name)
        except OSError:
            continue
    return found


def test_ctrl_c_at_the_worker_is_none_at_its_uploader(worker: Worker, proxy: S3Proxy, store: S3Store) -> None:
    assert os.getsid(worker.child) == worker.child
    worker.process.send_signal(signal.SIGINT)
    worker.process.wait(20)
    proxy.clear()
    until(lambda: committed(store) == [10], 60)
    until(lambda: not alive(worker.child))


def test_without_its_worker_it_ends_at_its_bound(prefix: str, proxy: S3Proxy, tmp_path: Path) -> None:
    proxy.fault("error", method="PUT", path="/data/")
    folder = tmp_path / "staging"
    path = folder / shard_key(10, 1, 0, 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    head = Record(kind="commit", seq=0, run="run-1", attempt=1, step=10, time=time.time(), world_size=1)
    ours, its = socket.socketpair()
    env = {
        **os.environ, "PYTHONPATH": PYTHONPATH, "TRAINYARD_CHECKPOINT_URI": prefix, "TRAINYARD_RUN_UID": "run-1",
        "TRAINYARD_CHECKPOINT_ENDPOINT": proxy.url,
    }  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-m", "trainyard.checkpoint.uploader", "--channel", str(its.fileno()), "--worker",
         str(os.getpid()), "--staging", str(folder), "--temporary", "--orphan-seconds", "1"],
        env=env, pass_fds=(its.fileno(),), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    its.close()
    with ours:
        ours.sendall(Staged(attempt=1, step=10, rank=0, world=1, path=str(path), size=1, record=head).line())
        until(lambda: [seen for seen in proxy.seen if "/data/" in seen.path])
    _, said = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "its 1 staged shards get up to 1 s" in said
    assert "1 staged shards were not uploaded in time" in said
    assert not folder.exists()


def test_a_worker_that_ends_takes_its_uploader_along(
    prefix: str, proxy: S3Proxy, store: S3Store, tmp_path: Path
) -> None:
    worker = Worker(prefix, proxy.url, tmp_path)
    assert worker.said()["op"] == "committed"
    assert worker.process.wait(30) == 0
    until(lambda: not alive(worker.child))
    assert not worker.staging.exists()
    assert worker.log.read_text() == ""
    assert worker.process.stdout is not None
    worker.process.stdout.close()


def test_an_uploader_that_cannot_begin_is_a_dropped_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: no boto3 to be found."""
    from trainyard.checkpoint.client import ChildUploads
    from trainyard.checkpoint.config import CheckpointConfig

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "boto3.py").write_text("raise SystemExit(78)\n")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    uploads = ChildUploads(CheckpointConfig(uri="s3://bucket/x", run="run-1"), tmp_path)
    uploads.submit(Staged(attempt=1, step=10, rank=0, world=1, path=str(tmp_path / "x"), size=1))
    outcome = uploads.take(30)
    assert outcome is not None
    assert (outcome.op, outcome.reason) == ("dropped", "the uploader process ended with code 78, 1 times")
    uploads.submit(Staged(attempt=1, step=20, rank=0, world=1, path=str(tmp_path / "x"), size=1))
    again = uploads.take(5)
    assert again is not None
    assert again.op == "dropped"
    assert not uploads.close()
    assert Outcome.from_message(from_line(again.line())) == again
