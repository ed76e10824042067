"""The uploader over a directory: commits, missing peers, newer attempts, lost connections."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainyard.checkpoint.client import LocalUploads, SocketUploads
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.format.digest import Descriptor, digest, part_size, tree_hash
from trainyard.checkpoint.messages import Outcome, Staged
from trainyard.checkpoint.store_local import LocalStore
from trainyard.checkpoint.uploader import _Server
from trainyard.checkpoint.uploads import UploadService
from trainyard_api.checkpoints import Record, descriptor_key, shard_key

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore((tmp_path / "bucket").as_uri(), "run-1")


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    folder = tmp_path / "staging"
    folder.mkdir()
    return folder


def stage(staging: Path, step: int, *, rank: int = 0, world: int = 1, attempt: int = 1) -> Staged:
    content = f"{step}/{rank}".encode() * 1000
    path = staging / shard_key(step, attempt, rank, world)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    head = Record(
        kind="commit", seq=0, run="run-1", attempt=attempt, step=step, time=time.time(), world_size=world
    )
    return Staged(
        attempt=attempt, step=step, rank=rank, world=world, path=str(path), size=len(content),
        record=None if rank else head,
    )  # fmt: skip


class Ear:
    """Collects outcomes."""

    def __init__(self) -> None:
        self.heard: list[Outcome] = []
        self._event = threading.Event()

    def __call__(self, outcome: Outcome) -> None:
        self.heard.append(outcome)
        self._event.set()

    def wait(self, seconds: float = 10) -> Outcome:
        assert self._event.wait(seconds), "no outcome"
        self._event.clear()
        return self.heard[-1]


def test_commits_once_all_ranks_of_all_pods_have_uploaded(store: LocalStore, staging: Path) -> None:
    pod0, pod1 = (
        UploadService(store, "run-1", staging=staging),
        UploadService(store, "run-1", staging=staging),
    )
    head, other = Ear(), Ear()
    pod0.submit(stage(staging, 10, world=2), head)
    assert pod0.flush(0.2) == 1, "it must wait for rank 1"
    pod1.submit(stage(staging, 10, rank=1, world=2), other)
    assert other.wait().op == "uploaded"
    committed = head.wait()
    assert (committed.op, committed.step, committed.seq) == ("committed", 10, 1)
    (record,) = CommitLog(store, "run-1").refresh()
    assert committed.uri == f"{store.uri}/commits/00000001.json"
    for shard in record.shards:
        content = store.get(shard.key)
        assert shard.sha256 == tree_hash([digest(content)])
        assert (shard.size, shard.part_size) == (len(content), part_size(len(content)))
        described = json.loads(store.get(shard.key.replace(".safetensors", ".json")))
        assert Descriptor.from_json(described, shard).parts == [digest(content)]
    assert committed.size == sum(shard.size for shard in record.shards)
    assert not list(staging.glob("data/**/*.safetensors")), "what is uploaded is not kept unless it is to be"


def test_a_rank_that_never_comes_is_named(store: LocalStore, staging: Path) -> None:
    service = UploadService(store, "run-1", staging=staging, peers_seconds=0.3)
    ear, events = Ear(), []
    service.subscribe(events.append)
    service.submit(stage(staging, 10, world=3), ear)
    dropped = ear.wait()
    assert dropped.op == "dropped"
    assert "rank 1, 2" in dropped.reason
    assert [e["op"] for e in events] == ["warning", "dropped"]
    assert CommitLog(store, "run-1").refresh() == []


def test_an_older_attempt_is_dropped_as_fenced(store: LocalStore, staging: Path) -> None:
    CommitLog(store, "run-1").append(Record(kind="fence", seq=0, run="run-1", attempt=2, step=0, time=0.0))
    service, ear = UploadService(store, "run-1", staging=staging), Ear()
    service.submit(stage(staging, 10), ear)
    assert (ear.wait().op, ear.heard[-1].code) == ("dropped", 79)


def test_leftovers_of_killed_workers_are_swept_by_the_next_attempt(store: LocalStore, staging: Path) -> None:
    left = Path(stage(staging, 5, rank=1, world=2).path)
    service, ear = UploadService(store, "run-1", staging=staging), Ear()
    service.submit(stage(staging, 10, attempt=2), ear)
    assert ear.wait().op == "committed"
    assert not left.exists()


@pytest.mark.parametrize("damage", ["longer", "gone", "elsewhere"])
def test_a_staged_file_that_is_not_what_was_said_is_refused(
    store: LocalStore, staging: Path, damage: str
) -> None:
    service, ear = UploadService(store, "run-1", staging=staging), Ear()
    staged = stage(staging, 10)
    if damage == "elsewhere":
        other = Staged(
            attempt=1,
            step=10,
            rank=0,
            world=1,
            path="/etc/passwd",
            size=1,
            record=staged.record,
        )
        with pytest.raises(ValueError, match="not its place in the staging folder"):
            service.submit(other, ear)
        return
    if damage == "longer":
        Path(staged.path).write_bytes(b"y" * (staged.size + 1))
    else:
        Path(staged.path).unlink()
    service.submit(staged, ear)
    assert ear.wait().op == "dropped"
    assert CommitLog(store, "run-1").refresh() == []


def test_a_worker_that_submits_again_is_told_what_became_of_it(store: LocalStore, staging: Path) -> None:
    service, first, second = UploadService(store, "run-1", staging=staging), Ear(), Ear()
    staged = stage(staging, 10)
    service.submit(staged, first)
    assert first.wait().op == "committed"
    service.submit(staged, second)
    assert second.wait().seq == first.heard[-1].seq
    assert len(CommitLog(store, "run-1").refresh()) == 1


def test_local_uploads_hold_one_shard_in_flight(store: LocalStore, staging: Path) -> None:
    uploads = LocalUploads(store, "run-1", staging=staging, keep=2)
    assert uploads.take() is None
    uploads.submit(stage(staging, 10))
    outcome = uploads.take(10)
    assert outcome is not None
    assert outcome.op == "committed"
    assert not uploads.busy
    assert uploads.take() is None, "an outcome is told once"
    uploads.abandon(stage(staging, 11), "disk full")
    dropped = uploads.take()
    assert dropped is not None
    assert (dropped.op, dropped.reason) == ("dropped", "disk full")


def test_a_listing_that_is_old_does_not_hide_a_shard(staging: Path, tmp_path: Path) -> None:
    class Stale(LocalStore):
        """Its listings lack what came in the last seconds, as those of a server that is eventually consistent."""

        def list(self, prefix: str) -> list[str]:
            return [key for key in super().list(prefix) if not key.startswith("data/")]

    store = Stale((tmp_path / "bucket").as_uri(), "run-1")
    service, head = UploadService(store, "run-1", staging=staging, peers_seconds=10), Ear()
    for rank in range(1, 7):
        service.submit(stage(staging, 10, rank=rank, world=7), Ear())
    service.submit(stage(staging, 10, world=7), head)
    assert head.wait().op == "committed"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"shard": 1}', b"[" * 100_000, None])
def test_a_descriptor_that_is_not_one_is_refused(
    store: LocalStore, staging: Path, content: bytes | None
) -> None:
    service, ear = UploadService(store, "run-1", staging=staging, peers_seconds=5), Ear()
    if content is None:  # a sound one, of another shard
        service.submit(stage(staging, 9, rank=1, world=2), ear)
        assert ear.wait().op == "uploaded"
        content = store.get(descriptor_key(9, 1, 1, 2))
    store.put(descriptor_key(10, 1, 1, 2), content)
    service.submit(stage(staging, 10, world=2), ear)
    dropped = ear.wait()
    assert dropped.op == "dropped"
    assert "descriptor" in dropped.reason or descriptor_key(10, 1, 1, 2) in dropped.reason
    assert CommitLog(store, "run-1").refresh() == []


def test_a_second_try_for_a_step_never_writes_over_what_is_described(
    store: LocalStore, staging: Path
) -> None:
    """The first one may have got into the log though nobody heard of it."""
    service, first, second = UploadService(store, "run-1", staging=staging, peers_seconds=0.2), Ear(), Ear()
    service.submit(stage(staging, 10, world=2), first)
    assert first.wait().op == "dropped"
    before = store.get(shard_key(10, 1, 0, 2))
    again = stage(staging, 10, world=2)
    Path(again.path).write_bytes(b"!" * again.size)
    service.submit(stage(staging, 10, rank=1, world=2), Ear())
    service.submit(again, second)
    assert second.wait().op == "committed"
    assert store.get(shard_key(10, 1, 0, 2)) == before
    (record,) = CommitLog(store, "run-1").refresh()
    assert record.shards[0].sha256 == tree_hash([digest(before)])


def test_a_shard_that_an_uploader_before_let_go_is_found_in_the_bucket(
    store: LocalStore, staging: Path
) -> None:
    """Killed between the last deed and the word: its worker asks the next one."""
    staged, ear = stage(staging, 10, rank=1, world=2), Ear()
    before = UploadService(store, "run-1", staging=staging)
    before.submit(staged, ear)
    assert ear.wait().op == "uploaded"
    assert not Path(staged.path).exists()
    UploadService(store, "run-1", staging=staging).submit(staged, ear)
    assert ear.wait().op == "uploaded"


def test_files_are_given_back_for_the_next_save(store: LocalStore, staging: Path) -> None:
    service, ear = UploadService(store, "run-1", staging=staging), Ear()
    for step in (10, 20, 30):
        service.submit(stage(staging, step), ear)
        assert ear.wait().op == "committed"
    assert len(list((staging / "free").iterdir())) == 1, "one for the one rank of this node"
    assert not (staging / "data").exists() or not list(staging.glob("data/**/*.safetensors"))


def test_a_file_that_a_checkpoint_is_linked_to_is_not_given_back(store: LocalStore, staging: Path) -> None:
    service, ear = UploadService(store, "run-1", staging=staging), Ear()
    staged = stage(staging, 10)
    os.link(staged.path, staging.parent / "another-name")
    service.submit(staged, ear)
    assert ear.wait().op == "committed"
    assert not list(staging.glob("free/*"))


@pytest.fixture
def server(store: LocalStore, staging: Path, tmp_path: Path) -> Iterator[_Server]:
    with _Server(str(tmp_path / "up.sock"), UploadService(store, "run-1", staging=staging)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def test_over_the_socket(server: _Server, staging: Path) -> None:
    agent = socket.socket(socket.AF_UNIX)
    agent.connect(server.server_address)
    agent.settimeout(10)
    agent.sendall(b'{"op":"subscribe"}\nnonsense\n')
    lines = agent.makefile()
    assert json.loads(lines.readline())["op"] == "error"
    worker = SocketUploads(str(server.server_address))
    worker.flush(0.1)
    worker.submit(stage(staging, 10))
    outcome = worker.take(10)
    assert outcome is not None
    assert outcome.op == "committed"
    heard = json.loads(lines.readline())
    assert (heard["op"], heard["step"], heard["seq"], heard["uri"]) == ("committed", 10, 1, outcome.uri)
    late = socket.socket(socket.AF_UNIX)
    late.connect(server.server_address)
    late.settimeout(10)
    late.sendall(b'{"op":"subscribe"}\n')
    assert json.loads(late.makefile().readline())["step"] == 10, "a new subscriber hears the newest commit"
    for connection in (worker, agent, late, lines):
        connection.close()


def test_the_process_survives_its_client_and_a_restart_of_itself(
    store: LocalStore, staging: Path, tmp_path: Path
) -> None:
    """Killed while rank 1 is missing; the worker reconnects to the next one, submits again, and hears of the commit."""
    path = str(tmp_path / "u.sock")
    env = {
        **os.environ, "PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'trainer-image'}", "TRAINYARD_RUN_UID": "run-1",
        "TRAINYARD_CHECKPOINT_URI": store.uri.removesuffix("/run-1"),
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "trainyard.checkpoint.uploader",
        "--socket",
        path,
        "--staging",
        str(staging),
    ]
    first = subprocess.Popen(command, env=env)
    worker = second = None
    try:
        worker = SocketUploads(path)
        staged = stage(staging, 10, world=2)
        worker.submit(staged)
        end = time.monotonic() + 10
        while not store.list("data/"):  # its own shard is uploaded
            assert time.monotonic() < end
            time.sleep(0.01)
        first.kill()
        first.wait(10)
        second = subprocess.Popen(command, env=env)
        other = SocketUploads(path)
        other.submit(stage(staging, 10, rank=1, world=2))
        other.close()  # a client that goes away takes nothing with it
        outcome = worker.take(20)
        assert outcome is not None
        assert outcome.op == "committed"
        second.send_signal(signal.SIGTERM)
        assert second.wait(10) == 0
        assert not Path(path).exists()
    finally:
        if worker is not None:
            worker.close()
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(10)


def test_without_an_address_the_process_says_so() -> None:
    env = {"PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'trainer-image'}"}
    done = subprocess.run(
        [sys.executable, "-m", "trainyard.checkpoint.uploader", "--socket", "x", "--staging", "y"],
        env=env, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert "TRAINYARD_CHECKPOINT_URI" in done.stderr
