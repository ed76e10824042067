"""What an uploader does with staged shards: upload, wait for the others, commit, prune, tell everybody.

The same class runs in the uploader process of a pod and in a thread of a worker on a laptop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.config import KeepBest
from trainyard.checkpoint.errors import (
    CheckpointError,
    NotFound,
    ShardInvalid,
    StoreUnavailable,
    exit_code,
)
from trainyard.checkpoint.format.digest import Descriptor, part_size, tree_hash
from trainyard.checkpoint.messages import Outcome, Staged
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.stores import Store
from trainyard.checkpoint.tier.copies import Neighbours
from trainyard.checkpoint.tier.keeper import Keeper
from trainyard.checkpoint.tier.known import write_known
from trainyard_api.checkpoints import Fenced, Record, Shard, descriptor_key, shard_key, step_prefix
from trainyard_api.serde import encode

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
_BLIND = 4
"""Descriptors that a poll asks for though the listing lacks them."""
_MOST_RANKS = 99_999
"""What the names of shards have room for."""
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
        keep_best: KeepBest | None = None,
        local: bool = False,
        upload_seconds: float = UPLOAD_SECONDS,
        peers_seconds: float = PEERS_SECONDS,
    ) -> None:
        """`local`: the newest save stays in `staging`."""
        self._store = store
        self._run = run
        self._commits = CommitLog(store, run)
        self._commits_lock = threading.Lock()
        self._staging = staging.resolve()
        self._keep, self._keep_best = keep, keep_best
        self._upload_seconds = upload_seconds
        self._peers_seconds = peers_seconds
        self._changed = threading.Condition()
        self._working = 0
        """Shards that are seen to, up to the deletion of what they replace."""
        self._pending: dict[_Key, Staged] = {}
        self._replies: dict[_Key, Reply] = {}
        self._done: dict[_Key, Outcome] = {}
        self._uploaded: dict[_Key, Shard] = {}
        self._listeners: list[Listener] = []
        self._newest_attempt = 0
        self._last_commit: Outcome | None = None
        self.keeper = Keeper(self._staging, keep=local, warn=self.warn)
        self.neighbours: Neighbours | None = None
        """Other nodes' uploaders, where there are any."""

    def submit(self, staged: Staged, reply: Reply) -> None:
        """Take over the file. `reply` is called from another thread. Raises ValueError for a path elsewhere, or numbers
        that cannot be.

        The same shard may be submitted again (a client that reconnected): it is told what became of it.
        """
        if not (staged.attempt >= 0 <= staged.step and 0 <= staged.rank < staged.world <= _MOST_RANKS):
            raise ValueError(f"no such shard: rank {staged.rank} of {staged.world}, step {staged.step}")
        path = Path(staged.path).resolve()
        if path != self._staging / shard_key(*_names(staged)):
            raise ValueError(f"path: {staged.path!r} is not its place in the staging folder")
        key = (staged.attempt, staged.step, staged.rank)
        with self._changed:
            self._newest_attempt = max(self._newest_attempt, staged.attempt)
            self._replies[key] = reply
            done = self._done.get(key)
            if done is not None and done.op == "dropped" and path.exists():
                done = None  # another try, not another question
            if done is None and key in self._pending:
                return
            self._pending[key] = staged
            busy = {Path(s.path).resolve() for s in self._pending.values()}
            if done is None:
                self._working += 1
        save = (staged.attempt, staged.step)
        if done is not None:
            self.keeper.ended(save, path, staged.rank, committed=done.op == "committed")
            self._finish(staged, done)
            return
        self.keeper.began(save, staged.rank, path, busy)
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
        begin = time.monotonic()
        try:
            outcome = self._upload_and_commit(staged, path)
        except Exception as error:  # whatever it is: its worker waits for an answer
            reason = (
                str(error)
                if isinstance(error, CheckpointError | Fenced)
                else f"{type(error).__name__}: {error}"
            )
            outcome = Outcome(
                op="dropped", attempt=staged.attempt, step=staged.step, rank=staged.rank, reason=reason,
                code=exit_code(error),
            )  # fmt: skip
            self.warn(
                f"the checkpoint of step {staged.step} (attempt {staged.attempt}) was dropped: {reason}"
            )
        outcome = replace(outcome, seconds=round(time.monotonic() - begin, 6))
        committed = outcome.op == "committed"
        self.keeper.ended((staged.attempt, staged.step), path, staged.rank, committed=committed)
        if committed and self.neighbours is not None:
            self.neighbours.committed(staged.attempt, staged.step)
        self._finish(staged, outcome)
        if committed:
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

    def warn(self, text: str) -> None:
        """Tell the log and all subscribers: people should see it."""
        log.warning("%s", text)
        self._publish({"op": "warning", "message": text})

    def _upload_and_commit(self, staged: Staged, path: Path) -> Outcome:
        shard = self._upload(staged, path)
        if staged.record is None:
            return Outcome(
                op="uploaded", attempt=staged.attempt, step=staged.step, rank=staged.rank, size=shard.size
            )
        head = replace(staged.record, shards=self._await_shards(staged, shard), world_size=staged.world)
        with self._commits_lock:
            record: Record = self._patiently(staged, lambda: self._commits.append(head))
            self._note_log()
        return Outcome(
            op="committed", attempt=record.attempt, step=record.step, rank=staged.rank, seq=record.seq,
            uri=self._commits.uri(record.seq), time=record.time, size=sum(s.size for s in record.shards),
            stall_seconds=record.stall_seconds, reason=record.reason,
        )  # fmt: skip

    def _upload(self, staged: Staged, path: Path) -> Shard:
        """Shard and descriptor. Raises StoreError, ValueError, OSError."""
        names, key = _names(staged), (staged.attempt, staged.step, staged.rank)
        if key in self._uploaded:
            # A second try for this step. What has a descriptor is never written over: it may be in a commit by now.
            return self._uploaded[key]
        if not path.exists():
            # An uploader before this one may have let it go, and died before it could say that it was done.
            with contextlib.suppress(NotFound, ShardInvalid):
                return self._patiently(staged, lambda: self._descriptor(staged, staged.rank))
            raise ValueError(f"{path.name} is gone, and it is not in the bucket")
        if path.stat().st_size != staged.size:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {staged.size}")
        name, part = shard_key(*names), part_size(staged.size)
        parts = self._patiently(staged, lambda: self._store.put_parts(name, path, part))
        shard = Shard(
            key=name, rank=staged.rank, size=staged.size, sha256=tree_hash(parts), part_size=part
        )  # fmt: skip
        descriptor = Descriptor(shard=shard, parts=parts)
        text = json.dumps(descriptor.to_json()).encode()
        self._patiently(staged, lambda: self._store.put(descriptor_key(*names), text))
        with self._changed:
            self._uploaded[key] = shard
            while len(self._uploaded) > _REMEMBERED:
                del self._uploaded[next(iter(self._uploaded))]
        if self.keeper.uploaded(path, descriptor) and self.neighbours is not None:
            self.neighbours.copy(path, descriptor)
        return shard

    def _await_shards(self, staged: Staged, own: Shard) -> list[Shard]:
        """Of all ranks. Raises CheckpointError that names the ranks whose descriptor did not come, ShardInvalid.

        A listing finds them all at once, but may be old; so a few of those that it lacks are asked for by name, too.
        """
        found = {staged.rank: own}
        left, pause, blind = self._peers_seconds, _POLL_SECONDS[0], 0
        while len(found) < staged.world:
            begin = time.monotonic()
            prefix = step_prefix(staged.step, staged.attempt)
            listed = self._patiently(staged, lambda: self._store.list(prefix))  # noqa: B023 - called at once
            missing = [rank for rank in range(staged.world) if rank not in found]
            there = {rank for rank in missing if descriptor_key(*_names(staged, rank)) in listed}
            blind += _BLIND
            for rank in {*there, *_window([r for r in missing if r not in there], blind, _BLIND)}:
                with contextlib.suppress(NotFound):
                    found[rank] = self._patiently(
                        staged, lambda: self._descriptor(staged, rank)  # noqa: B023
                    )  # fmt: skip
            if len(found) == staged.world:
                break
            left -= min(time.monotonic() - begin, 1.0) + pause
            if left <= 0:
                named = ", ".join(str(r) for r in range(staged.world) if r not in found)
                raise CheckpointError(f"no shard of rank {named} came within {self._peers_seconds:g} s")
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_SECONDS[1])
        return [found[rank] for rank in range(staged.world)]

    def _descriptor(self, staged: Staged, rank: int) -> Shard:
        """What rank `rank` says of its shard. Raises NotFound, StoreError, ShardInvalid."""
        key = descriptor_key(*_names(staged, rank))
        try:
            data = json.loads(self._store.get(key))
        except (ValueError, RecursionError) as error:
            raise ShardInvalid(f"{key}: is not JSON") from error
        shard = Descriptor.from_json(data).shard
        if (shard.key, shard.rank) != (shard_key(*_names(staged, rank)), rank):
            raise ShardInvalid(f"{key}: describes another shard")
        return shard

    def _patiently(self, staged: Staged, call: Callable[[], T]) -> T:
        """`call`, again and again while the store is away, unless a newer attempt has begun on this pod."""

        def on_retry(error: StoreUnavailable, tries: int) -> None:
            if tries == 1:
                self.warn(f"step {staged.step}: {error}; trying again for up to {self._upload_seconds:g} s")
            if self._newest_attempt > staged.attempt:
                raise Fenced(
                    f"attempt {self._newest_attempt} has begun; attempt {staged.attempt} may not write"
                )

        return with_retries(call, seconds=self._upload_seconds, on_retry=on_retry)

    def _note_log(self) -> None:
        """With the lock: leave the log for the next attempt on this node. It only makes its start faster."""
        with contextlib.suppress(OSError):
            write_known(self._staging, self._store.uri, self._run, self._commits.records)

    def _prune(self, staged: Staged) -> None:
        try:
            with self._commits_lock:
                self._commits.prune(keep=self._keep, keep_best=self._keep_best, attempt=staged.attempt)
                self._note_log()
        except (CheckpointError, Fenced) as error:
            self.warn(f"old checkpoints were not pruned, the next commit tries again: {error}")


def _names(staged: Staged, rank: int | None = None) -> tuple[int, int, int, int]:
    """The arguments of `shard_key` and `descriptor_key`."""
    return staged.step, staged.attempt, staged.rank if rank is None else rank, staged.world


def _window(ranks: list[int], begin: int, count: int) -> Collection[int]:
    """`count` of them, others each time that `begin` has moved on."""
    return {ranks[(begin + n) % len(ranks)] for n in range(min(count, len(ranks)))}
