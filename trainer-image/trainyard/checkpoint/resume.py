"""The start of an attempt: find the newest commit that all ranks can load, load it, and fence off older attempts.

In two steps, because what a rank needs of the tensors depends on how the model is laid out, and the model is made only when
it is known what the run goes on with: `open` finds a commit and reads what is not a tensor, `load` reads the tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import (
    CheckpointError,
    NoUsableCheckpoint,
    ShardInvalid,
    StoreConfigError,
    StoreUnavailable,
    from_wire,
    to_wire,
)
from trainyard.checkpoint.format.tree import unflatten
from trainyard.checkpoint.loading import Layout, State, load_state
from trainyard.checkpoint.policy import candidates, fence_reason
from trainyard.checkpoint.reader import PATIENCE_SECONDS, CheckpointReader
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.sources import StoreSource
from trainyard.checkpoint.stores import Store
from trainyard.checkpoint.tier import open_tier
from trainyard.peers import Peers
from trainyard_api.checkpoints import Fenced, Record, check_fence, commit_key, commits_newest_first

if TYPE_CHECKING:
    from trainyard.checkpoint.tier import Tier

log = logging.getLogger("trainyard.checkpoint")

_STARTS = 10
_VERDICTS = (StoreConfigError, StoreUnavailable, CheckpointError)
"""What a rank may meet on loading, the gravest first: only the last is a reason to take an older commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """Where the attempt will start, if its tensors turn out to be whole."""

    record: Record
    uri: str
    main: dict[str, Any]
    """The checkpoint, with None for each tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Where the attempt starts."""

    record: Record
    uri: str
    state: State
    fell_back: str
    """Why newer commits were passed over."""
    bytes_read: dict[str, int]
    """By source (local, peer, store), by this rank."""


class Resumption:
    """One per attempt. Both methods are collective, and raise on all ranks alike: Fenced, StoreConfigError,
    StoreUnavailable, NoUsableCheckpoint."""

    def __init__(self, store: Store, config: CheckpointConfig, peers: Peers, staging: Path) -> None:
        self._store = store
        self._config = config
        self._peers = peers
        self.tier: Tier = open_tier(config, peers, staging)
        self._commits: CommitLog | None = None  # rank 0's
        self._passed_over: list[str] = []
        self._records: list[Record] = []
        """Candidates that are left."""
        self._uris: dict[str, str] = {}
        self._required = ""
        self._reader: CheckpointReader | None = None
        self.attempt = 0
        self.log_records: list[Record] = []
        """Rank 0: the whole log as it was found."""

    @property
    def log_now(self) -> list[Record]:
        """Rank 0: the log with the fence of this attempt."""
        return [] if self._commits is None else self._commits.records

    def open(self) -> Opened | None:
        """None: the attempt begins from the beginning; its fence is written."""
        return self._open(self.tier.known_records() if self._peers.rank == 0 else None)

    def load(self, layout: Layout, *, shared: bool = False) -> Loaded | None:
        """What `open` found, or, where that turns out to be damaged or is not the newest any more, what it is to be
        instead; None: from the beginning, because the policy allows it and no commit was ever made.

        The fence is only written when the record that was loaded is still the newest. `shared`: all ranks want most of it,
        as `layout` says, so that each part is read by one of them.
        """
        for _ in range(_STARTS):
            state: State | None = None
            while self._records:
                record, reader = self._records[0], self._reader
                if reader is None:
                    raise RuntimeError("open() comes first")
                together = self._peers if shared and self._peers.world > 1 else None
                state = self._together(
                    record,
                    lambda: load_state(reader, self._peers.rank, layout, together),  # noqa: B023
                )
                if state is not None:
                    break
                self._next()
            if state is None:
                return None
            if self._write_fence(record):
                return Loaded(
                    record=record, uri=self._uri(record), state=state, fell_back="; ".join(self._passed_over),
                    bytes_read=dict(reader.bytes_read),
                )  # fmt: skip
            if self._open(None) is None:
                return None
        raise CheckpointError(
            f"{self._store.uri}: other writers changed the log {_STARTS} times while it was read"
        )

    # ---- steps

    def _open(self, known: list[Record] | None) -> Opened | None:
        for _ in range(_STARTS):
            proposal = self._leader(lambda: self._propose(known))  # noqa: B023
            known = None
            self.attempt = int(proposal["attempt"])
            self._records = [
                Record.from_json(r, run=self._config.run_id, seq=r["seq"]) for r in proposal["records"]
            ]
            self._uris = proposal["uris"]
            self._passed_over = list(proposal["unreadable"])
            self._required = str(proposal["required"])
            main = self._read_tree() if self._records else None
            if main is None and (self._records or self._required or self._passed_over):
                main = self._next()
            if main is not None:
                record = self._records[0]
                return Opened(record=record, uri=self._uri(record), main=main)
            if self._write_fence(None):
                return None
        raise CheckpointError(
            f"{self._store.uri}: other writers changed the log {_STARTS} times while it was read"
        )

    def _next(self) -> dict[str, Any] | None:
        """The candidate after the present one, which is damaged."""
        while len(self._records) > 1:
            del self._records[0]
            main = self._read_tree()
            if main is not None:
                return main
        self._records = []
        if self._passed_over:
            raise NoUsableCheckpoint(
                f"none of the checkpoints under {self._store.uri} can be used: {'; '.join(self._passed_over)}. Restore "
                "the bucket's objects, or start a new run; this one will not begin from zero over them"
            )
        if self._required:
            raise NoUsableCheckpoint(
                f"{self._required}, and {self._store.uri} has no such checkpoint; correct the URI or the policy (resume: "
                "auto begins from the beginning where there is none)"
            )
        return None

    def _read_tree(self) -> dict[str, Any] | None:
        record = self._records[0]
        sources = [*self.tier.sources(record), StoreSource(self._store)]
        reader = self._reader = CheckpointReader(record, sources)

        def read() -> dict[str, Any]:
            return {"tree": reader.tree("checkpoint")} if self._peers.rank == 0 else {}

        found = self._together(record, read)
        if found is None:
            return None
        tree = self._peers.broadcast(found)["tree"]

        def build() -> dict[str, Any]:
            main = unflatten(tree, lambda ref: None)
            if not isinstance(main, dict):
                raise ShardInvalid(f"the checkpoint of step {record.step} is no dict")
            return main

        return self._together(record, build)

    def _propose(self, known: list[Record] | None) -> dict[str, Any]:
        run = self._config.run_id
        self._commits = commits = CommitLog(self._store, run, known or ())
        records = commits.records if known else commits.refresh()
        attempt = self._config.attempt
        restart = attempt is not None and attempt > 1
        if attempt is None:
            attempt = 1 + max((r.attempt for r in records), default=0)
        check_fence(records, attempt)
        self.log_records = list(records)
        found = candidates(records, self._config.resume, restart=restart)
        newest = commits_newest_first(records)
        # An unreadable record older than what is proposed is no news: it was passed over before.
        horizon = found.records[0].seq if found.records else newest[0].seq if newest else 0
        unreadable = [text for seq, text in sorted(commits.unreadable.items(), reverse=True) if seq > horizon]
        if not found.records and newest and not found.required:
            log.warning(
                "resume is %r: the run begins from the beginning over %d checkpoints",
                self._config.resume,
                len(newest),
            )
        return {
            "attempt": attempt,
            "records": [r.to_json() for r in found.records],
            "uris": {str(r.seq): commits.uri(r.seq) for r in found.records},
            "unreadable": [] if self._config.resume == "never" and not found.records else unreadable,
            "required": found.why if found.required else "",
        }

    def _write_fence(self, start: Record | None) -> bool:
        fence = Record(
            kind="fence", seq=0, run=self._config.run_id, attempt=self.attempt, time=time.time(),
            step=start.step if start else 0, parent=start.seq if start else 0,
            reason=fence_reason(self._config.resume),
        )  # fmt: skip

        def append() -> bool:
            return self._commits is not None and self._commits.try_append(fence) is not None

        return bool(self._leader(append))

    # ---- together

    def _leader(self, call: Callable[[], Any]) -> Any:
        """What `call` returns on rank 0, or its error, on every rank."""
        answer: dict[str, Any] = {}
        if self._peers.rank == 0:
            try:
                answer["value"] = with_retries(call, seconds=PATIENCE_SECONDS, longest=2.0)
            except (CheckpointError, Fenced) as error:
                answer["error"] = to_wire(error)
        answer = self._peers.broadcast(answer)
        if "error" in answer:
            raise from_wire(answer["error"])
        return answer["value"]

    def _together(self, record: Record, work: Callable[[], Any]) -> Any:
        """What `work` returns on this rank; None, with the reason in `_passed_over`, if a rank finds a shard damaged."""
        found, mine = None, None
        try:
            found = work()
        except CheckpointError as error:
            mine = to_wire(error)
        errors = [from_wire(e) for e in self._peers.gather(mine) if e is not None]
        if not errors:
            return found
        worst = min(errors, key=lambda e: next(i for i, kind in enumerate(_VERDICTS) if isinstance(e, kind)))
        if isinstance(worst, StoreConfigError | StoreUnavailable):
            raise worst
        self._passed_over.append(str(worst))
        if self._peers.rank == 0:
            log.warning("checkpoint of step %d cannot be used, trying the one before: %s", record.step, worst)
        return None

    def _uri(self, record: Record) -> str:
        return self._uris[str(record.seq)]


def newest(store: Store, run: str, seq: int | None = None) -> tuple[Record, State, list[str]]:
    """(record, what rank 0 would load, why newer ones were passed over) of the newest commit that is whole, or of `seq`.

    Nothing is written, so that a run may be read while it trains.
    Raises NoUsableCheckpoint, StoreConfigError, StoreUnavailable.
    """
    commits = CommitLog(store, run)
    records = commits_newest_first(with_retries(commits.refresh, seconds=PATIENCE_SECONDS, longest=2.0))
    passed_over = [text for _, text in sorted(commits.unreadable.items(), reverse=True)]
    for record in records:
        if seq is not None and record.seq != seq:
            continue
        try:
            return record, load_state(CheckpointReader(record, [StoreSource(store)]), 0), passed_over
        except ShardInvalid as error:
            passed_over.append(str(error))
    which = "no checkpoint" if seq is None else f"no checkpoint {commit_key(seq)}"
    raise NoUsableCheckpoint("; ".join([f"{store.uri}: {which} that can be used", *passed_over]))
