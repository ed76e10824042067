"""The start of an attempt: find the newest commit that all ranks can load, load it, and fence off older attempts."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.errors import (
    CheckpointError,
    NotFound,
    NoUsableCheckpoint,
    ShardInvalid,
    StoreConfigError,
    StoreUnavailable,
    from_wire,
    to_wire,
)
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.snapshot import load_file
from trainyard.checkpoint.stores import Store
from trainyard.peers import Peers
from trainyard_api.checkpoints import Fenced, Record, Shard, check_fence, commit_key, commits_newest_first

log = logging.getLogger("trainyard.checkpoint")

PATIENCE_SECONDS = 10.0
"""How long a store may be unreachable at the start before the attempt gives up."""
_STARTS = 10
_VERDICTS = (StoreConfigError, StoreUnavailable, CheckpointError)
"""What a rank may meet on loading, the gravest first: only the last is a reason to take an older commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Where the attempt starts."""

    attempt: int
    record: Record | None
    """None: from the beginning."""
    uri: str
    main: dict[str, Any]
    """Rank 0's payload: model, optimizers, loop."""
    own: dict[str, Any]
    """This rank's payload; empty if the checkpoint has no such rank."""
    fell_back: str
    """Why newer commits were passed over."""


def resume(store: Store, run: str, attempt: int | None, peers: Peers, scratch: Path) -> Loaded:
    """Collective. Raises, on all ranks alike: Fenced, StoreConfigError, StoreUnavailable, NoUsableCheckpoint.

    `attempt` None takes one more than the newest in the log (laptop). The fence is only written when the record that
    was loaded is still the newest: if another commit came meanwhile, all starts over with it.
    """
    commits = CommitLog(store, run)  # used by rank 0 only
    for _ in range(_STARTS):
        proposal = _leader(peers, lambda: _propose(commits, attempt))
        number = int(proposal["attempt"])
        records = [Record.from_json(r, run=run, seq=r["seq"]) for r in proposal["records"]]
        passed_over = list(proposal["unreadable"])
        found: Loaded | None = None
        for record in records:
            uri = f"{store.uri}/{commit_key(record.seq)}"
            payloads = _load_together(store, record, peers, scratch, passed_over)
            if payloads is not None:
                found = Loaded(
                    attempt=number, record=record, uri=uri, main=payloads[0], own=payloads[1],
                    fell_back="; ".join(passed_over),
                )  # fmt: skip
                break
        if found is None and (records or passed_over):
            raise NoUsableCheckpoint(
                f"none of the checkpoints under {store.uri} can be used: {'; '.join(passed_over)}. Restore the bucket's "
                "objects, or start a new run; this one will not begin from zero over them"
            )
        fence = _fence(run, number, found)
        if _leader(peers, lambda: commits.try_append(fence) is not None):  # noqa: B023
            if found is None:
                return Loaded(attempt=number, record=None, uri="", main={}, own={}, fell_back="")
            return found
    raise CheckpointError(f"{store.uri}: other writers changed the log {_STARTS} times while it was read")


def newest(
    store: Store, run: str, scratch: Path, seq: int | None = None
) -> tuple[Record, dict[str, Any], list[str]]:
    """(record, rank 0's payload, why newer ones were passed over) of the newest commit that is whole, or of commit `seq`.

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
            return record, _fetch(store, record.shards[0], scratch / "fetch.pt"), passed_over
        except ShardInvalid as error:
            passed_over.append(str(error))
    which = "no checkpoint" if seq is None else f"no checkpoint {commit_key(seq)}"
    raise NoUsableCheckpoint("; ".join([f"{store.uri}: {which} that can be used", *passed_over]))


def _leader(peers: Peers, call: Callable[[], Any]) -> Any:
    """What `call` returns on rank 0, or its error, on every rank."""
    answer: dict[str, Any] = {}
    if peers.rank == 0:
        try:
            answer["value"] = with_retries(call, seconds=PATIENCE_SECONDS, longest=2.0)
        except (CheckpointError, Fenced) as error:
            answer["error"] = to_wire(error)
    answer = peers.broadcast(answer)
    if "error" in answer:
        raise from_wire(answer["error"])
    return answer["value"]


def _propose(commits: CommitLog, attempt: int | None) -> dict[str, Any]:
    records = commits.refresh()
    if attempt is None:
        attempt = 1 + max((r.attempt for r in records), default=0)
    check_fence(records, attempt)
    newest = commits_newest_first(records)
    # An unreadable record older than what is proposed is no news: it was passed over before.
    horizon = newest[0].seq if newest else 0
    unreadable = [text for seq, text in sorted(commits.unreadable.items(), reverse=True) if seq > horizon]
    return {"attempt": attempt, "records": [r.to_json() for r in newest], "unreadable": unreadable}


def _fence(run: str, attempt: int, found: Loaded | None) -> Record:
    start = found.record if found else None
    return Record(
        kind="fence", seq=0, run=run, attempt=attempt, time=time.time(), step=start.step if start else 0,
        parent=start.seq if start else 0,
    )  # fmt: skip


def _load_together(
    store: Store, record: Record, peers: Peers, scratch: Path, passed_over: list[str]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(rank 0's payload, own payload); None, with the reason added to `passed_over`, if a rank finds a shard damaged."""
    payloads: tuple[dict[str, Any], dict[str, Any]] | None = None
    mine: dict[str, str] | None = None
    try:
        payloads = _load(store, record, peers.rank, scratch)
    except CheckpointError as error:
        mine = to_wire(error)
    except OSError as error:  # of the scratch file: says nothing about the checkpoint
        mine = to_wire(StoreUnavailable(f"rank {peers.rank} cannot write to {scratch}: {error.strerror}"))
    errors = [from_wire(e) for e in peers.gather(mine) if e is not None]
    if not errors:
        return payloads
    worst = min(errors, key=lambda e: next(i for i, kind in enumerate(_VERDICTS) if isinstance(e, kind)))
    if isinstance(worst, StoreConfigError | StoreUnavailable):
        raise worst
    passed_over.append(str(worst))
    if peers.rank == 0:
        log.warning("checkpoint of step %d cannot be used, trying the one before: %s", record.step, worst)
    return None


def _load(store: Store, record: Record, rank: int, scratch: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    shards = {s.rank: s for s in record.shards}
    main = _fetch(store, shards[0], scratch / f"fetch-{rank}.pt")
    if rank == 0:
        return main, main
    return main, _fetch(store, shards[rank], scratch / f"fetch-{rank}.pt") if rank in shards else {}


def _fetch(store: Store, shard: Shard, path: Path) -> dict[str, Any]:
    """The payload of a shard whose content is what its commit says. Raises ShardInvalid, StoreError."""

    def download() -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        with path.open("wb") as file:
            for chunk in store.read(shard.key):
                size += len(chunk)
                digest.update(chunk)
                file.write(chunk)
                if size > shard.size:
                    break  # do not fill the disk with what is wrong anyway
        return size, digest.hexdigest()

    try:
        size, sha256 = with_retries(download, seconds=PATIENCE_SECONDS, longest=2.0)
        if size != shard.size:
            raise ShardInvalid(f"{shard.key}: has {size} bytes, its commit says {shard.size}")
        if sha256 != shard.sha256:
            raise ShardInvalid(f"{shard.key}: its SHA-256 is not the one in its commit")
        return load_file(path, shard.key)
    except NotFound as error:
        raise ShardInvalid(f"{shard.key}: is missing") from error
    finally:
        path.unlink(missing_ok=True)
