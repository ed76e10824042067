"""Nodes of a gang on loopback addresses: each an uploader process with a folder of its own, and workers' ends to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.trainer.forkhost import PYTHONPATH
from trainyard.checkpoint.client import SocketUploads
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import CheckpointError
from trainyard.checkpoint.format.digest import digest, spans
from trainyard.checkpoint.messages import Outcome, Staged
from trainyard.checkpoint.sources import Source
from trainyard.checkpoint.tier import Tier, open_tier
from trainyard_api.checkpoints import Record, Shard, shard_key

PART = 16 << 20


def content(step: int, rank: int, size: int) -> bytes:
    """What rank `rank` saves at step `step`."""
    return (f"{step}/{rank}.".encode() * (size // 4 + 1))[:size]


def until(what: Callable[[], Any], seconds: float = 20) -> Any:
    """What `what` returns once it is true; AssertionError if that takes too long."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.02)
    return found


@dataclass
class Peer:
    """One rank of a gang whose ranks are called one after the other: `answers` is what all of them say."""

    rank: int
    world: int
    answers: list[Any] = field(default_factory=list)
    said: list[Any] = field(default_factory=list)

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        self.said.append(json.loads(json.dumps(value)))
        return self.answers

    def any(self, flag: bool) -> bool:
        return flag


@dataclass
class Node:
    """The pod of rank `rank`: one process a node."""

    rank: int
    folder: Path
    env: dict[str, str]
    arguments: list[str] = field(default_factory=list)
    limit: int = 0
    """MiB of a file system of its own for the staging folder, in a mount namespace; 0: none."""
    process: subprocess.Popen[bytes] | None = None
    uploads: SocketUploads | None = None

    @property
    def staging(self) -> Path:
        return self.folder / "staging"

    @property
    def socket(self) -> str:
        return str(self.folder / "u.sock")

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def outside(self) -> Path:
        """The staging folder, as other processes than the uploader see it."""
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/root{self.staging}") if self.limit else self.staging

    def start(self) -> Node:
        self.staging.mkdir(parents=True, exist_ok=True)
        mount = f'mount -t tmpfs -o size={self.limit}m tmpfs "{self.staging}" && exec "$@"'
        limited = ["unshare", "-Urm", "sh", "-c", mount, "sh"] if self.limit else []
        own = {"TRAINYARD_POD_IP": f"127.0.0.{self.rank + 11}", "TRAINYARD_RUNTIME_DIR": str(self.folder)}
        self.env |= {**own, "TRAINYARD_UPLOADER_SOCKET": self.socket}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*limited, sys.executable, "-m", "trainyard.checkpoint.uploader", "--socket", self.socket, "--staging",
                 str(self.staging), "--peers-seconds", "20", *self.arguments],
                env={**os.environ, **self.env, "PYTHONPATH": PYTHONPATH}, stderr=log,
            )  # fmt: skip
        return self

    def worker(self) -> SocketUploads:
        if self.uploads is None:
            self.uploads = SocketUploads(self.socket)
        return self.uploads

    def save(self, step: int, world: int, *, attempt: int = 1, size: int = 100_000) -> Staged:
        """Stage this rank's shard and hand it over."""
        key = shard_key(step, attempt, self.rank, world)
        path, here = self.staging / key, self.outside / key
        here.parent.mkdir(parents=True, exist_ok=True)
        for free in list(self.outside.glob("free/*.safetensors"))[:1]:
            free.replace(here)
        with here.open("r+b" if here.exists() else "wb") as file:
            file.write(content(step, self.rank, size))
            file.truncate()
        head = Record(
            kind="commit", seq=0, run="run-1", attempt=attempt, step=step, time=time.time(), world_size=world
        )
        staged = Staged(
            attempt=attempt, step=step, rank=self.rank, world=world, path=str(path), size=size,
            record=None if self.rank else head,
        )  # fmt: skip
        self.worker().submit(staged)
        return staged

    def outcome(self, seconds: float = 30) -> Outcome:
        found = self.worker().take(seconds)
        assert found is not None, f"no outcome\n{self.log}"
        return found

    def tier(self, peer: Peer, attempt: int = 2) -> Tier:
        config = CheckpointConfig.from_env({**self.env, "TRAINYARD_ATTEMPT": str(attempt)})
        assert config is not None
        return open_tier(config, peer, self.staging, self.env)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)

    def stop(self) -> None:
        if self.uploads is not None:
            self.uploads.close()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
                    self.process.wait(20)


def together(nodes: list[Node], call: Callable[[Tier], Any], attempt: int = 2) -> list[Any]:
    """A collective of all nodes' tiers: once to hear what each says, once with all that."""
    peers = [Peer(n, len(nodes)) for n in range(len(nodes))]
    for node, peer in zip(nodes, peers, strict=True):
        with contextlib.suppress(IndexError, ValueError):  # what it makes of nobody's answers
            call(node.tier(peer, attempt))
    said = [peer.said[-1] for peer in peers]
    found = []
    for node, peer in zip(nodes, peers, strict=True):
        peer.answers = said
        found.append(call(node.tier(peer, attempt)))
    return found


def read(source: Source, shard: Shard) -> bytes:
    """The whole shard, verified. Raises CheckpointError."""
    parts = source.descriptor(shard).parts
    found = bytearray(shard.size)
    for (begin, end), wanted in zip(spans(shard.size, shard.part_size), parts, strict=True):
        view = memoryview(found)[begin:end]
        source.read_into(shard, begin, view)
        if digest(view) != wanted:
            raise CheckpointError(f"{shard.key}: bytes {begin} to {end} are damaged")
    return bytes(found)
