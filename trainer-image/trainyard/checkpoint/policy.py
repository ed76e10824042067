"""Which commits an attempt may start from: `CheckpointConfig.resume`, decided from the log alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainyard_api.checkpoints import Record, commits_newest_first


@dataclass(frozen=True, slots=True)
class Candidates:
    records: list[Record]
    """In the order in which to try them."""
    required: bool
    """Without one that can be used the run may not begin."""
    why: str
    """For the message."""


def candidates(records: Sequence[Record], policy: str, *, restart: bool) -> Candidates:
    """`restart`: the run goes on by itself after an attempt that had the same policy (a TrainingRun's second attempt):
    a policy that was followed once is not followed again, or each restart would lose what was done since.
    """
    commits = commits_newest_first(records)
    if policy == "auto":
        return Candidates(commits, False, "")
    if policy == "required":
        return Candidates(commits, True, "resume is 'required'")
    followed = _since(records, policy) if restart else None
    if policy == "never":
        return Candidates([] if followed is None else [c for c in commits if followed(c)], False, "")
    step = int(policy)
    chosen = [c for c in commits if c.step == step][:1]
    since = [] if followed is None else [c for c in commits if followed(c)]
    return Candidates(since + [c for c in chosen if c not in since], True, f"resume names step {step}")


def fence_reason(policy: str) -> str:
    """What a fence says of the policy with which its attempt began."""
    return f"resume={policy}"


def _since(records: Sequence[Record], policy: str) -> Callable[[Record], bool] | None:
    """Whether a commit was made after the policy was followed; None if it was not yet.

    Fences of all attempts of late that had it: the first of them followed it, or, if that one was pruned, went on from a
    commit that did.
    """
    tail: Record | None = None
    for fence in sorted((r for r in records if r.kind == "fence"), key=lambda r: r.seq, reverse=True):
        if fence.reason != fence_reason(policy):
            break
        tail = fence
    if tail is None:
        return None
    return lambda commit: commit.seq > tail.seq or 0 < commit.seq <= tail.parent
