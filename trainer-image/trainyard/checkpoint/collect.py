"""What dead saves have left in a store: data that no commit names, and uploads that nobody will finish.

A save that may still be committed is never touched. It is of the newest attempt (older ones cannot commit any more, since
the fence) and, since an attempt has one save in flight, of a later step than that attempt's commits; one commit more is
allowed for, because nothing is gained by being quick.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from trainyard.checkpoint.errors import StoreError, StoreUnavailable
from trainyard.checkpoint.stores import Leftover, Store
from trainyard_api.checkpoints import SAVE_PREFIX, Record, commits_newest_first

log = logging.getLogger("trainyard.checkpoint")

UPLOAD_SECONDS = 24 * 3600.0
"""No upload is under way for as long as this; the store's clock and ours need not agree well."""
_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Saves:
    """Which saves are over, by the log."""

    committed: frozenset[tuple[int, int]]
    """(step, attempt) of all commits."""
    attempt: int
    """The newest."""
    horizon: int
    """No save of the newest attempt that is below this step is under way."""

    @classmethod
    def of(cls, records: Collection[Record]) -> Saves:
        attempt = max((r.attempt for r in records), default=0)
        commits = commits_newest_first(records)
        own = [r.step for r in commits if r.attempt == attempt]
        return cls(
            committed=frozenset((r.step, r.attempt) for r in commits),
            attempt=attempt,
            horizon=own[1] if len(own) > 1 else 0,
        )

    def over(self, step: int, attempt: int) -> bool:
        """Whether this save is not under way any more, whatever became of it."""
        if (step, attempt) in self.committed or attempt < self.attempt:
            return True
        return attempt == self.attempt and step < self.horizon


def dead_data(keys: Iterable[str], saves: Saves) -> list[str]:
    """Those of saves that are over and were not committed. What is not laid out as ours is left alone."""
    return [
        key
        for key in keys
        if (m := SAVE_PREFIX.match(key))
        and (int(m[1]), int(m[2])) not in saves.committed
        and saves.over(int(m[1]), int(m[2]))
    ]


def dead_uploads(leftovers: Iterable[Leftover], saves: Saves, before: float) -> list[Leftover]:
    """Those of saves that are over, and all that were begun before `before` (Unix seconds)."""
    return [
        found
        for found in leftovers
        if found.begun < before or ((m := SAVE_PREFIX.match(found.key)) and saves.over(int(m[1]), int(m[2])))
    ]


def sweep(
    store: Store, records: Collection[Record], *, pruned: Collection[Record], all_read: bool
) -> list[str]:
    """Delete the data of `pruned`, which are not in `records` any more, and what dead saves have left; the keys.

    `all_read` False: there are records that could not be read. Whose data they name is unknown, so nothing but the data of
    `pruned` goes. Raises StoreError.
    """
    saves = Saves.of(records)
    dropped = {(r.step, r.attempt) for r in pruned} - saves.committed
    keys = store.list("data/")
    dead = {key for key in keys if (m := SAVE_PREFIX.match(key)) and (int(m[1]), int(m[2])) in dropped}
    if all_read:
        dead.update(dead_data(keys, saves))
    store.delete(sorted(dead))
    return sorted(dead) + _abort(store, saves)


def _abort(store: Store, saves: Saves) -> list[str]:
    try:
        uploads = dead_uploads(store.leftovers(), saves, time.time() - UPLOAD_SECONDS)
        for leftover in uploads:
            store.abort(leftover)
    except StoreUnavailable:
        raise
    except StoreError as error:  # not all servers list uploads, and not all credentials may
        if store.uri not in _warned:
            _warned.add(store.uri)
            log.warning(
                "uploads of processes that died are not freed, a lifecycle rule of the bucket could: %s",
                error,
            )
        return []
    return [leftover.key for leftover in uploads]
