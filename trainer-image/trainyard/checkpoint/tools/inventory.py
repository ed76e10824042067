"""Which objects belong to which commit, and which to none. Decided from a log and a listing alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trainyard.checkpoint.sources import descriptor_of
from trainyard_api.checkpoints import Record, commits_newest_first, step_prefix

_PREFIX = re.compile(r"data/step-(\d{12})/a(\d{6})/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """Objects of one save that no commit names."""

    prefix: str
    keys: tuple[str, ...]
    size: int
    """Bytes."""
    under_way: bool
    """It may be a save that is not committed yet: newer than every commit, and of the newest attempt."""


def missing(record: Record, sizes: Mapping[str, int]) -> list[str]:
    """What a listing alone shows to be wrong with a commit, a sentence each."""
    found = []
    for shard in record.shards:
        size = sizes.get(shard.key)
        if size is None:
            found.append(f"{shard.key}: is missing")
        elif size != shard.size:
            found.append(f"{shard.key}: has {size} bytes, its commit says {shard.size}")
        if descriptor_of(shard.key) not in sizes:
            found.append(f"{descriptor_of(shard.key)}: is missing")
    return found


def orphans(records: Iterable[Record], sizes: Mapping[str, int]) -> list[Orphan]:
    """By prefix. A key under data/ that is not laid out as ours is its own prefix."""
    records = list(records)
    commits = commits_newest_first(records)
    named = {key for c in commits for shard in c.shards for key in (shard.key, descriptor_of(shard.key))}
    committed = {step_prefix(c.step, c.attempt) for c in commits}
    newest = max((c.step for c in commits), default=-1)
    attempt = max((r.attempt for r in records), default=0)
    left: dict[str, list[str]] = {}
    for key in sorted(set(sizes) - named):
        match = _PREFIX.match(key)
        left.setdefault(match[0] if match else key, []).append(key)
    found = []
    for prefix, keys in left.items():
        match = _PREFIX.match(prefix)
        young = (
            match is not None
            and prefix not in committed
            and int(match[2]) >= attempt
            and int(match[1]) > newest
        )
        found.append(
            Orphan(prefix=prefix, keys=tuple(keys), size=sum(sizes[k] for k in keys), under_way=young)
        )
    return found
