"""What retention would delete, and doing it. The rules are `prunable`'s and `collect`'s, those of a run that trains."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from trainyard.checkpoint.collect import UPLOAD_SECONDS, Saves, dead_data, dead_uploads
from trainyard.checkpoint.config import KeepBest
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.stores import Leftover
from trainyard.checkpoint.tools.places import PATIENCE_SECONDS, Run
from trainyard_api.checkpoints import Record, commits_newest_first, prunable


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What would go."""

    old: list[Record]
    kept: list[Record]
    orphans: list[str]
    """Keys of saves that are over and were never committed."""
    uploads: list[Leftover]
    unreadable: int
    """Records that cannot be read. While there are any, orphans stay: one of those records may name them."""

    @property
    def empty(self) -> bool:
        return not (self.old or self.orphans or self.uploads)

    def what(self) -> str:
        return f"{len(self.old)} checkpoints, {len(self.orphans)} orphans, {len(self.uploads)} unfinished uploads"

    def lines(self) -> list[str]:
        """For people."""
        found = [f"checkpoint of step {r.step} (seq {r.seq})" for r in self.old]
        found += [f"orphan {key}" for key in self.orphans]
        found += [f"unfinished upload of {each.key}" for each in self.uploads]
        found.append(f"kept: {', '.join(f'step {r.step}' for r in self.kept) or 'nothing'}")
        if self.unreadable:
            found.append(f"{self.unreadable} records cannot be read: what they may name is left alone")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "checkpoints": [{"seq": r.seq, "step": r.step} for r in self.old],
            "kept": [{"seq": r.seq, "step": r.step} for r in self.kept],
            "orphans": self.orphans,
            "uploads": [{"key": each.key, "upload": each.upload_id} for each in self.uploads],
            "unreadable": self.unreadable,
        }


def plan(run: Run, *, keep: int, keep_best: KeepBest | None) -> Plan:
    """Nothing is changed. Raises StoreError."""
    records = run.records
    best = (keep_best.metric, keep_best.mode, keep_best.count) if keep_best else None
    old = prunable(records, keep=keep, keep_best=best)
    # As `CommitLog.prune` has it: data of a commit that goes is no orphan, and is deleted with it.
    saves = Saves.of(records)
    uploads = with_retries(run.store.leftovers, seconds=PATIENCE_SECONDS)
    return Plan(
        old=old,
        kept=[r for r in commits_newest_first(records) if r not in old],
        orphans=[] if run.log.unreadable else dead_data(run.objects, saves),
        uploads=dead_uploads(uploads, saves, time.time() - UPLOAD_SECONDS),
        unreadable=len(run.log.unreadable),
    )


def prune(run: Run, *, keep: int, keep_best: KeepBest | None) -> int:
    """Delete it; how many objects went. The log is read again: a run may have gone on since `plan`.

    Raises Fenced if a new attempt begins meanwhile, StoreError.
    """
    attempt = max((r.attempt for r in run.records), default=0)
    gone = with_retries(
        lambda: run.log.prune(keep=keep, keep_best=keep_best, attempt=attempt), seconds=PATIENCE_SECONDS
    )
    return len(gone)
