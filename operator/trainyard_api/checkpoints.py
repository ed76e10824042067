"""The commit log of a run: where its checkpoints are, which one is the newest, who may still write.

Under `<uri>/<run-uid>/` (S3 prefix or directory):

    data/step-000000000120/a000003/shard-00001-of-00004.safetensors  one per rank, written by that rank's pod
    data/step-000000000120/a000003/shard-00001-of-00004.json         its size and checksums, written after it
    commits/00000017.json                                            record 17 of the log
    commits/00000017.000003-5be1c0ffee00d1ce.json                    the same, on a server without conditional writes

Records are numbered without gaps from 1 and created by a conditional PUT (`If-None-Match: *`; O_EXCL in a
directory). Two kinds: a *fence* opens an attempt, a *commit* makes a step durable. A writer appends record
k+1 only after it has read all records up to k and seen no fence of a newer attempt. So a writer of an older
attempt meets either a key that is taken (it reads on, finds the fence, and drops) or, if the tail it knew
was pruned, writes below the newest record, where no reader looks. That is the whole fence: it needs no clock,
no lock and no operator. docs/decisions/0003-commit-log.md has the argument, and what is done where a server
has no conditional writes.

The order of records is that of (attempt, seq): the numbers' own, but for what a fenced writer has left behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trainyard_api.serde import decode, encode

MANIFEST_VERSION = 2
SAFE_KEY = re.compile(r"data/step-\d{12}/a\d{6}/shard-\d{5}-of-\d{5}\.safetensors")
"""What a manifest may name. Anything else (.., absolute, other run) makes the manifest invalid."""
RECORD_KEY = re.compile(r"commits/(\d{8})(?:\.(\d{6,})-([0-9a-f]{16}))?\.json")
"""Groups: seq; attempt and nonce, if the server has no conditional writes."""
MOST_SHARD = 5 << 40
"""Bytes. What claims to be larger would decide how much a reader allocates."""
MOST_PART = 1 << 30
"""Bytes: the parts of the largest shard."""
SAVE_PREFIX = re.compile(r"data/step-(\d{12})/a(\d{6})/")
"""Groups: step, attempt."""


def commit_key(seq: int) -> str:
    return f"commits/{seq:08d}.json"


def unique_commit_key(seq: int, attempt: int, nonce: str) -> str:
    """For a server without conditional writes: no two writers ever choose the same."""
    return f"commits/{seq:08d}.{attempt:06d}-{nonce}.json"


def step_prefix(step: int, attempt: int) -> str:
    return f"data/step-{step:012d}/a{attempt:06d}/"


def shard_key(step: int, attempt: int, rank: int, world: int) -> str:
    return f"{step_prefix(step, attempt)}shard-{rank:05d}-of-{world:05d}.safetensors"


def descriptor_key(step: int, attempt: int, rank: int, world: int) -> str:
    return shard_key(step, attempt, rank, world).removesuffix(".safetensors") + ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's file."""

    key: str
    """Relative to the run's prefix."""
    rank: int
    size: int
    """Bytes."""
    sha256: str
    """Lower-case hex: SHA-256 over the digests of its parts (`trainyard.checkpoint.format.digest`)."""
    part_size: int = 0
    """Bytes of each part but the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where in the data the run is, independent of the world size.

    The samples of epoch `epoch` already used are the first `samples` of that epoch's permutation, which is a
    function of (seed, epoch) alone.
    """

    epoch: int = 0
    samples: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One object of the log. `kind` is "fence" or "commit"."""

    kind: str
    seq: int
    run: str
    """UID of the run: a record of another run is never accepted."""
    attempt: int
    step: int
    """commit: the step that it holds. fence: the step that the attempt starts from."""
    time: float
    """Unix seconds, for people; nothing is decided by it."""
    world_size: int = 0
    shards: list[Shard] = field(default_factory=list)
    cursor: Cursor = Cursor()
    parent: int = 0
    """seq of the commit that the attempt was resumed from, 0 if from nothing."""
    versions: dict[str, str] = field(default_factory=dict)
    """torch, trainyard."""
    reason: str = ""
    """commit: why it was made: steps, time, auto, epoch, stop, exception, end."""
    metrics: dict[str, float] = field(default_factory=dict)
    """commit: what was logged last, finite numbers only: retention chooses the best by them."""
    stall_seconds: float = 0.0
    """commit: how long rank 0's training stood still for it."""
    alive_seconds: float = 0.0
    """commit: how long the run had trained by then, over all attempts, and"""
    failures: int = 0
    """how often that had ended with a loss of steps: older records are pruned, and the automatic interval needs to know."""
    version: int = MANIFEST_VERSION

    def to_json(self) -> dict[str, Any]:
        return encode(self)  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Any, *, run: str, seq: int) -> Record:
        """Raises ValueError when it is not a valid record `seq` of `run`."""
        record = decode(cls, data, path=commit_key(seq))
        problems = {
            f"version {record.version} is newer than {MANIFEST_VERSION}": record.version > MANIFEST_VERSION,
            f"belongs to run {record.run}": record.run != run,
            f"says seq {record.seq}": record.seq != seq,
            f"kind {record.kind!r} is unknown": record.kind not in ("fence", "commit"),
            "has negative numbers": min(record.attempt, record.step, record.world_size) < 0,
            # By the number of shards first: a world size that lies must not decide how much is allocated.
            "shards do not match its world size": record.kind == "commit"
            and (
                len(record.shards) != record.world_size
                or sorted(s.rank for s in record.shards) != list(range(record.world_size))
            ),
            "names a key outside its step": any(
                not SAFE_KEY.fullmatch(s.key)
                or s.key != shard_key(record.step, record.attempt, s.rank, record.world_size)
                for s in record.shards
            ),
            "has shards of sizes that cannot be": any(
                not (0 <= s.size <= MOST_SHARD and 0 <= s.part_size <= MOST_PART) for s in record.shards
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"{commit_key(seq)}: {problem}")
        return record


class Fenced(Exception):
    """A newer attempt has begun: this process must not write any more."""


def next_seq(known: Iterable[int]) -> int:
    """Number of the next record."""
    return max(known, default=0) + 1


def check_fence(records: Iterable[Record], attempt: int) -> None:
    """Raises Fenced if any record is of an attempt newer than `attempt`."""
    newest = max((r.attempt for r in records), default=0)
    if newest > attempt:
        raise Fenced(f"attempt {newest} has begun; attempt {attempt} may not write")


def order(record: Record) -> tuple[int, int]:
    """Sort key: the newest record has the highest."""
    return record.attempt, record.seq


def commits_newest_first(records: Iterable[Record]) -> list[Record]:
    """Candidates for a resume, in the order in which to try them."""
    return sorted((r for r in records if r.kind == "commit"), key=order, reverse=True)


def newest_fence(records: Iterable[Record]) -> Record | None:
    return max((r for r in records if r.kind == "fence"), key=order, default=None)


def best_commits(records: Iterable[Record], metric: str, mode: str, count: int) -> list[Record]:
    """Up to `count` commits with the best values of `metric` ("min" or "max"), the best first, of equals the newest."""
    logged = [r for r in commits_newest_first(records) if math.isfinite(r.metrics.get(metric, math.nan))]
    sign = -1 if mode == "max" else 1
    return sorted(logged, key=lambda r: sign * r.metrics[metric])[:count]


def prunable(
    records: Iterable[Record], *, keep: int, keep_best: tuple[str, str, int] | None = None
) -> list[Record]:
    """Commits whose data may be deleted: all but the newest `keep` (at least 2, or all there are) and the best by
    `keep_best` (metric, "min" or "max", how many).

    Never the parent of the newest fence: that attempt has found it to be good, may be loading it, and the newer ones that it
    passed over are none.
    """
    records = list(records)
    commits = commits_newest_first(records)
    kept = {order(r) for r in commits[: max(keep, 2)]}
    if keep_best is not None:
        kept |= {order(r) for r in best_commits(records, *keep_best)}
    fence = newest_fence(records)
    in_use = fence.parent if fence else 0
    return [r for r in commits if order(r) not in kept and r.seq != in_use]


def spent_fences(records: Iterable[Record], pruned: Iterable[Record]) -> list[Record]:
    """Fences below the oldest commit that is left after `pruned` are gone; never the newest fence."""
    records = list(records)
    gone = {order(r) for r in pruned}
    oldest = min((order(r) for r in records if r.kind == "commit" and order(r) not in gone), default=(0, 0))
    newest = newest_fence(records)
    return [r for r in records if r.kind == "fence" and r is not newest and order(r) < oldest]
