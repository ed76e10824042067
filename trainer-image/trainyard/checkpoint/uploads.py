"""What an uploader does with staged shards: upload, wait for the others, commit, prune, tell everybody.

The same class runs in the uploader process of a pod and in a thread of a worker on a laptop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.errors import CheckpointError, StoreUnavailable, exit_code
from trainyard.checkpoint.messages import Outcome, Staged
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.stores import Store
from trainyard_api.checkpoints import Fenced, Record, Shard, descriptor_key, shard_key, step_prefix
from trainyard_api.serde import decode, encode

log = logging.getLogger("trainyard.checkpoint")

T = TypeVar("T")
_Key = tuple[int, int, int]
"""attempt, step, rank"""
Reply = Callable[[Outcome], None]
Listener = Callable[[dict[str, Any]], None]
"""Takes messages: every Outcome, and {"op": "warning", "message"} for people."""
UPLOAD_SECONDS = 600.0
"""How long an outage of the store may last before a save is dropped."""
PEERS_SECONDS = 120.0
"""How long the head waits for the other ranks' descriptors, outages of the store not counted."""
_POLL_SECONDS = (0.05, 1.0)
_REMEMBERED = 64
"""Outcomes kept for clients that lost their connection before they heard."""


class UploadService:
    """One thread per staged shard: a pod has few, and each rank at most one in flight."""

    def __init__(
        self,
        store: Store,
        run: str,
        *,
        staging: Path,
        keep: int = 3,
        upload_seconds: float = UPLOAD_SECONDS,
        peers_seconds: float = PEERS_SECONDS,
    ) -> None:
        self._store = store
        self._commits = CommitLog(store, run)
        self._commits_lock = threading.Lock()
        self._staging = staging.resolve()
        self._keep = keep
        self._upload_seconds = upload_seconds
        self._peers_seconds = peers_seconds
        self._changed = threading.Condition()
        self._working = 0
        """Shards that are seen to, up to the deletion of what they replace."""
        self._pending: dict[_Key, Staged] = {}
        self._replies: dict[_Key, Reply] = {}
        self._done: dict[_Key, Outcome] = {}
        self._listeners: list[Listener] = []
        self._newest_attempt = 0
        self._last_commit: Outcome | None = None

    def submit(self, staged: Staged, reply: Reply) -> None:
        """Take over the file. `reply` is called from another thread. Raises ValueError for a path elsewhere.

        The same shard may be submitted again (a client that reconnected): it is told what became of it.
        """
        path = Path(staged.path).resolve()
        if not path.is_relative_to(self._staging):
            raise ValueError(f"path: {staged.path!r} is not in the staging folder")
        key = (staged.attempt, staged.step, staged.rank)
        with self._changed:
            self._newest_attempt = max(self._newest_attempt, staged.attempt)
            self._replies[key] = reply
            done = self._done.get(key) if not path.exists() else None
            if done is None and key in self._pending:
                return
            self._pending[key] = staged
        if done is not None:
            self._finish(staged, done)
            return
        self._sweep()
        with self._changed:
            self._working += 1
        threading.Thread(
            target=self._work, args=(staged, path), name=f"upload-{staged.step}-{staged.rank}", daemon=True
        ).start()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Hear all commits and drops, beginning with the newest commit so far; returns the unsubscriber."""
        with self._changed:
            self._listeners.append(listener)
            newest = self._last_commit
        if newest is not None:
            listener(encode(newest))

        def unsubscribe() -> None:
            with self._changed, contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return unsubscribe

    def flush(self, seconds: float) -> int:
        """Wait until nothing is pending, at most `seconds`; returns how many shards still are."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending, timeout=seconds)
            return len(self._pending)

    def settle(self, seconds: float) -> bool:
        """Wait until nothing is done any more, the deletion of old checkpoints neither; False at the bound."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._working, timeout=seconds)

    def _work(self, staged: Staged, path: Path) -> None:
        try:
            self._handle(staged, path)
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    def _handle(self, staged: Staged, path: Path) -> None:
        try:
            outcome = self._upload_and_commit(staged, path)
        except (CheckpointError, Fenced, OSError, ValueError) as error:
            path.unlink(missing_ok=True)
            reason = (
                str(error)
                if isinstance(error, CheckpointError | Fenced)
                else f"{type(error).__name__}: {error}"
            )
            outcome = Outcome(
                op="dropped", attempt=staged.attempt, step=staged.step, rank=staged.rank, reason=reason,
                code=exit_code(error),
            )  # fmt: skip
            self._warn(
                f"the checkpoint of step {staged.step} (attempt {staged.attempt}) was dropped: {reason}"
            )
        self._finish(staged, outcome)
        if outcome.op == "committed":
            self._prune(staged)

    def _finish(self, staged: Staged, outcome: Outcome) -> None:
        key = (staged.attempt, staged.step, staged.rank)
        with self._changed:
            self._pending.pop(key, None)
            self._done[key] = outcome
            while len(self._done) > _REMEMBERED:
                del self._done[next(iter(self._done))]
            if outcome.op == "committed":
                self._last_commit = outcome
            reply = self._replies.pop(key, None)
            self._changed.notify_all()
        if reply is not None:
            with contextlib.suppress(OSError):  # it hung up
                reply(outcome)
        if outcome.op != "uploaded":
            self._publish(encode(outcome))

    def _publish(self, message: dict[str, Any]) -> None:
        with self._changed:
            listeners = list(self._listeners)
        for hear in listeners:
            with contextlib.suppress(OSError):
                hear(message)

    def _warn(self, text: str) -> None:
        log.warning("%s", text)
        self._publish({"op": "warning", "message": text})

    def _upload_and_commit(self, staged: Staged, path: Path) -> Outcome:
        names = (staged.step, staged.attempt, staged.rank, staged.world)
        shard = Shard(key=shard_key(*names), rank=staged.rank, size=staged.size, sha256=staged.sha256)
        if path.stat().st_size != staged.size:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {staged.size}")
        self._patiently(staged, lambda: self._store.put_file(shard.key, path, staged.sha256))
        descriptor = json.dumps(encode(shard)).encode()
        self._patiently(staged, lambda: self._store.put(descriptor_key(*names), descriptor))
        path.unlink(missing_ok=True)
        if staged.record is None:
            return Outcome(op="uploaded", attempt=staged.attempt, step=staged.step, rank=staged.rank)
        head = replace(staged.record, shards=self._await_shards(staged), world_size=staged.world)
        with self._commits_lock:
            record: Record = self._patiently(staged, lambda: self._commits.append(head))
        return Outcome(
            op="committed", attempt=record.attempt, step=record.step, rank=staged.rank, seq=record.seq,
            uri=self._commits.uri(record.seq), time=record.time,
        )  # fmt: skip

    def _await_shards(self, staged: Staged) -> list[Shard]:
        """The descriptors of all ranks. Raises CheckpointError that names the ranks whose one did not come."""
        found: dict[int, Shard] = {}
        left, pause = self._peers_seconds, _POLL_SECONDS[0]
        while True:
            begin = time.monotonic()
            listed = self._patiently(
                staged, lambda: self._store.list(step_prefix(staged.step, staged.attempt))
            )
            for rank in set(range(staged.world)) - set(found):
                key = descriptor_key(staged.step, staged.attempt, rank, staged.world)
                if key in listed:
                    found[rank] = self._descriptor(staged, key, rank)
            if len(found) == staged.world:
                return [found[rank] for rank in range(staged.world)]
            left -= min(time.monotonic() - begin, 1.0) + pause
            if left <= 0:
                missing = ", ".join(str(r) for r in range(staged.world) if r not in found)
                raise CheckpointError(f"no shard of rank {missing} came within {self._peers_seconds:g} s")
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_SECONDS[1])

    def _descriptor(self, staged: Staged, key: str, rank: int) -> Shard:
        data = self._patiently(staged, lambda: self._store.get(key))
        shard = decode(Shard, json.loads(data), path=key)
        expected = shard_key(staged.step, staged.attempt, rank, staged.world)
        if (shard.key, shard.rank) != (expected, rank) or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"{key}: describes another shard")
        return shard

    def _patiently(self, staged: Staged, call: Callable[[], T]) -> T:
        """`call`, again and again while the store is away, unless a newer attempt has begun on this pod."""

        def on_retry(error: StoreUnavailable, tries: int) -> None:
            if tries == 1:
                self._warn(f"step {staged.step}: {error}; trying again for up to {self._upload_seconds:g} s")
            if self._newest_attempt > staged.attempt:
                raise Fenced(
                    f"attempt {self._newest_attempt} has begun; attempt {staged.attempt} may not write"
                )

        return with_retries(call, seconds=self._upload_seconds, on_retry=on_retry)

    def _prune(self, staged: Staged) -> None:
        try:
            with self._commits_lock:
                self._commits.prune(keep=self._keep, attempt=staged.attempt)
        except (CheckpointError, Fenced) as error:
            self._warn(f"old checkpoints were not pruned, the next commit tries again: {error}")

    def _sweep(self) -> None:
        """Delete what workers of older attempts left staged when they were killed."""
        with self._changed:
            newest = self._newest_attempt
            busy = {Path(s.path).resolve() for s in self._pending.values()}
        for folder in self._staging.glob("data/step-*/a*"):
            old = re.fullmatch(r"a\d{6}", folder.name) and int(folder.name[1:]) < newest
            if old and not any(path.is_relative_to(folder) for path in busy):
                shutil.rmtree(folder, ignore_errors=True)
