"""Counts the commits that agents report: each once, though every pod of a run says what it knows in every beat."""

from __future__ import annotations

from collections.abc import Callable

from trainyard_api.protocol import Checkpoint
from trainyard_operator.metrics import Metrics
from trainyard_operator.plan.texts import finite, whole

REASONS = frozenset({"steps", "time", "auto", "epoch", "stop", "exception", "end"})
"""Values of the label `reason` (checkpoints.Record.reason); "other" for all else, so that labels stay few."""


class CommitMeter:
    """`known(run_uid)` is the number of the newest commit in the status: it was counted before this process."""

    def __init__(self, metrics: Metrics, known: Callable[[str], int]) -> None:
        self._metrics = metrics
        self._known = known
        self._newest: dict[str, int] = {}

    def heard(self, run_uid: str, commit: Checkpoint) -> None:
        """An agent of the run told of this commit."""
        seq = whole(commit.seq) or 0
        before = self._newest.get(run_uid)
        if before is None:
            before = self._known(run_uid)
        self._newest[run_uid] = max(seq, before)
        if seq <= before:
            return
        self._metrics.commits.labels(commit.reason if commit.reason in REASONS else "other").inc()
        self._metrics.commit_bytes.inc(whole(commit.bytes) or 0)
        for seconds, histogram in (
            (finite(commit.upload_seconds), self._metrics.upload_seconds),
            (finite(commit.stall_seconds), self._metrics.stall_seconds),
        ):
            if seconds is not None:
                histogram.observe(max(seconds, 0.0))

    def forget(self, run_uid: str) -> None:
        """The run is gone."""
        self._newest.pop(run_uid, None)
