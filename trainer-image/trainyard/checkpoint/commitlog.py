"""Reading and appending the commit log of one run. The rules are in `trainyard_api.checkpoints`."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from trainyard.checkpoint.collect import sweep
from trainyard.checkpoint.config import KeepBest
from trainyard.checkpoint.errors import NotFound, ShardInvalid, StoreError
from trainyard.checkpoint.stores import Store
from trainyard_api.checkpoints import (
    RECORD_KEY,
    Record,
    check_fence,
    commit_key,
    next_seq,
    order,
    prunable,
    spent_fences,
    unique_commit_key,
)

log = logging.getLogger("trainyard.checkpoint")

_TRIES = 100
"""Records that others may put before ours before we call it a fault."""
_CHECKSUM = "digest"
"""Of a record's object: SHA-256 over the rest of it. Not a field of Record, and absent from what others wrote."""
_warned: set[str] = set()

Id = tuple[int, int]
"""(attempt, seq)"""


@dataclass(frozen=True, slots=True)
class _Written:
    """A record of ours on a server without conditional writes, of which it is not yet known whether it holds."""

    record: Record
    key: str
    known: frozenset[Id]
    """What was known when its number was chosen."""


class CommitLog:
    """Not for several threads at once. Records never change, so that each is fetched once only.

    `known`: records read before, by whoever; then the log is not listed before the first `try_append`.
    """

    def __init__(self, store: Store, run: str, known: Iterable[Record] = ()) -> None:
        self._store = store
        self._run = run
        self._records: dict[str, Record] = {commit_key(r.seq): r for r in known}
        """By key, here and below."""
        self._unreadable: dict[str, str] = {}
        self._listed = not self._records
        self._written: _Written | None = None

    @property
    def records(self) -> list[Record]:
        """As of the last `refresh`, the newest last."""
        by_id = {order(self._records[key]): self._records[key] for key in sorted(self._records, reverse=True)}
        return [by_id[each] for each in sorted(by_id)]

    @property
    def unreadable(self) -> dict[int, str]:
        """By seq: why the record is not used. Such a record still takes its number."""
        return {_seq(key): text for key, text in sorted(self._unreadable.items())}

    def uri(self, seq: int) -> str:
        """Of the commit `seq`, else of whatever has this number."""
        keys = sorted((r.kind != "commit", key) for key, r in self._records.items() if r.seq == seq)
        return f"{self._store.uri}/{keys[0][1] if keys else commit_key(seq)}"

    def refresh(self) -> list[Record]:
        """Read what is new. Raises StoreError."""
        present = [key for key in self._store.list("commits/") if RECORD_KEY.fullmatch(key)]
        self._listed = True
        last = max(map(_seq, present), default=0)
        for known in (self._records, self._unreadable):
            for key in set(known).difference(present):
                # A listing may be old, and lack what is new. What is gone from below was pruned.
                if _seq(key) <= last or _attempt(key) is not None:
                    del known[key]
        for key in present:
            if key not in self._records and key not in self._unreadable:
                self._learn(key)
        return self.records

    def try_append(self, record: Record) -> Record | None:
        """`record` with the number after all that are known; None if that number is taken: refresh, and decide anew.

        Raises Fenced if a newer attempt is known, StoreError; after StoreUnavailable it may be called again.
        """
        if not self._listed and record.attempt > 1 + max(
            (r.attempt for r in self._records.values()), default=0
        ):
            # Attempts have been here that we know nothing of: numbers that look free may have been pruned.
            before = {order(r) for r in self.records}
            if {order(r) for r in self.refresh()} != before:
                return None
        if not self._store.conditional:
            return self._try_unique(record)
        numbered = self._same(record)  # an earlier call got through, and only its answer was lost
        if numbered is None:
            self._check_fence(record)
            numbered = replace(record, seq=self._next())
            key = commit_key(numbered.seq)
            if self._store.create(key, _to_bytes(numbered)):
                self._records[key] = numbered
            else:
                # Asked for by name, because a listing may be old. It may be this very record, if the answer to an earlier
                # try was lost.
                self._learn(key)
                if self._records.get(key) != numbered:
                    self.refresh()
                    return None
        self._confirm(numbered)
        return numbered

    def append(self, record: Record) -> Record:
        """Append after whatever is there. Raises Fenced, StoreError; after StoreUnavailable it may be called again."""
        for _ in range(_TRIES):
            self.refresh()
            appended = self.try_append(record)
            if appended is not None:
                return appended
        raise StoreError(f"{self._store.uri}: lost the race for the next record {_TRIES} times")

    def prune(self, *, keep: int, attempt: int, keep_best: KeepBest | None = None) -> list[str]:
        """Delete old commits and what belongs to none; returns the keys. Raises Fenced, StoreError.

        The record goes first: a commit that is listed must be loadable.
        """
        self.refresh()
        if self._store.conditional:
            self._read_on()
        check_fence(self._records.values(), attempt)
        best = (keep_best.metric, keep_best.mode, keep_best.count) if keep_best else None
        records = self.records
        old = prunable(records, keep=keep, keep_best=best)
        spent = {order(r) for r in [*old, *spent_fences(records, old)]}
        gone = sorted(key for key, r in self._records.items() if order(r) in spent)
        kept = [r.seq for r in records if r.kind == "commit" and order(r) not in spent]
        if (
            kept
        ):  # below all of them nobody looks: then what could not be read need not keep its number any more
            gone += [key for key in sorted(self._unreadable) if _seq(key) < min(kept)]
        self._store.delete(gone)
        for key in gone:
            self._records.pop(key, None)
            self._unreadable.pop(key, None)
        return gone + sweep(self._store, self.records, pruned=old, all_read=not self._unreadable)

    # ---- conditional writes

    def _confirm(self, record: Record) -> None:
        """Raises Fenced unless no newer attempt is there once a commit is written.

        Its number may have been free only because what had it was pruned. Then it lies below newer records, and no reader
        takes it; but its writer must not believe it made.
        """
        if record.kind == "commit":
            self.refresh()
            self._check_fence(record)

    def _read_on(self) -> None:
        """What a listing that was old did not have: the numbers have no gaps."""
        for _ in range(_TRIES):
            key = commit_key(self._next())
            self._learn(key)
            if key not in self._records and key not in self._unreadable:
                return

    # ---- without them: docs/decisions/0003-commit-log.md has the argument

    def _try_unique(self, record: Record) -> Record | None:
        """Write under a name that nobody else has, look again, and take it back if somebody else was there as well."""
        if self._store.uri not in _warned:
            _warned.add(self._store.uri)
            log.warning(
                "%s: this server does not honour If-None-Match, so each record gets a name of its own and the log is listed "
                "again after each; that is safe if a listing has all that was written before it",
                self._store.uri,
            )
        written = self._written
        if written is None or replace(written.record, seq=record.seq) != record:
            there = self._same(record)
            if (
                there is not None
            ):  # of a process that died, and may have been told that it holds: not to be taken back
                self.refresh()
                self._check_fence(record)
                return there
            written = self._written = self._new(record)
        if written.key not in self._records:
            self._store.put(written.key, _to_bytes(written.record))
        self.refresh()
        now, mine = self._ids(), order(written.record)
        holds = not any(order(r) == mine for key, r in self._records.items() if key != written.key)
        if (
            record.kind == "fence"
        ):  # it goes on from what it knew: all of that, and nothing else, must be there
            holds = holds and now == written.known | {mine}
        if holds and max(now)[0] <= record.attempt:
            self._written = None
            return written.record
        self._store.delete([written.key])
        self._records.pop(written.key, None)
        self._written = None
        self._check_fence(record)
        return None

    def _new(self, record: Record) -> _Written:
        self._check_fence(record)
        numbered = replace(record, seq=self._next())
        key = unique_commit_key(numbered.seq, numbered.attempt, uuid.uuid4().hex[:16])
        return _Written(numbered, key, frozenset(self._ids()))

    def _ids(self) -> set[Id]:
        return {order(r) for r in self._records.values()} | {
            (_attempt(k) or 0, _seq(k)) for k in self._unreadable
        }

    # ---- both

    def _same(self, record: Record) -> Record | None:
        """The one that is known and differs from `record` at most in its number."""
        return next((r for r in self.records if replace(r, seq=record.seq) == record), None)

    def _next(self) -> int:
        return next_seq(map(_seq, [*self._records, *self._unreadable]))

    def _check_fence(self, record: Record) -> None:
        check_fence(self._records.values(), record.attempt)

    def _learn(self, key: str) -> None:
        """Fetch a record. If it is not what was written, once more: the fault may have been on the way."""
        for last in (False, True):
            try:
                self._records[key] = self._parse(key, self._store.get(key))
            except NotFound:
                pass  # pruned since the listing
            except (ValueError, RecursionError, ShardInvalid) as error:
                if not last:
                    continue
                self._unreadable[key] = str(error)
            return

    def _parse(self, key: str, data: bytes) -> Record:
        seq, attempt = _seq(key), _attempt(key)
        try:
            content = json.loads(data)
            if isinstance(content, dict) and content.pop(_CHECKSUM, None) not in (None, _checksum(content)):
                raise ValueError("its checksum is not that of its content")
            record = Record.from_json(content, run=self._run, seq=seq)
            if attempt not in (None, record.attempt):
                raise ValueError(f"says attempt {record.attempt}")
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith("commits/") else f"{key}: {text}") from error
        return record


def _to_bytes(record: Record) -> bytes:
    content = record.to_json()
    return json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1).encode()


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _seq(key: str) -> int:
    found = RECORD_KEY.fullmatch(key)
    return int(found[1]) if found else 0


def _attempt(key: str) -> int | None:
    """As the key says; None where there are conditional writes."""
    found = RECORD_KEY.fullmatch(key)
    return int(found[2]) if found and found[2] else None
