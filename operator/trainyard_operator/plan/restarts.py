"""May the run try again, when, and on which budget does the failure go (design part 5)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainyard_api.contract import FailureClass, Reason
from trainyard_api.v1alpha1 import AttemptStatus, Cause, RestartPolicy, Restarts, Status

MOST_DOUBLINGS = 30


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a failed attempt."""

    restarts: Restarts
    delay: float = 0.0
    """Seconds before the next attempt may run."""
    give_up: Reason | None = None
    """Why there is no next attempt."""
    why: str = ""


def judge(
    status: Status, policy: RestartPolicy, entry: AttemptStatus, cause: Cause, *, charged: bool
) -> Verdict:
    """The verdict on the attempt whose closed line of history is `entry`.

    `status.best_step` is the best of the attempts before it. The counters count restarts, so that a failure
    after which there is none leaves them; `without_progress` counts failed attempts.
    """
    if cause.failure_class == FailureClass.CONFIGURATION:
        return Verdict(status.restarts, give_up=Reason.CONFIGURATION, why="a restart cannot help")
    progressed = entry.last_step is not None and entry.last_step > status.best_step
    counters = _without_progress(status.restarts, entry, cause, progressed=progressed, charged=charged)
    if counters.without_progress >= max(1, policy.no_progress_limit):
        why = f"{counters.without_progress} attempts in a row ended without a step beyond {status.best_step}"
        return Verdict(counters, give_up=Reason.NO_PROGRESS, why=why)
    delay = 0.0 if progressed else _backoff(policy, max(counters.without_progress, _fruitless(status) + 1))
    if not charged:
        return Verdict(counters, delay)
    if cause.failure_class == FailureClass.INFRASTRUCTURE:
        used, limit, what = (
            counters.infrastructure,
            policy.max_infrastructure_restarts,
            "maxInfrastructureRestarts",
        )
        after = replace(counters, infrastructure=used + 1)
    else:
        used, limit, what = counters.user, policy.max_restarts, "maxRestarts"
        after = replace(counters, user=used + 1)
    if used >= limit:
        why = f"restartPolicy.{what} is {limit}"
        return Verdict(counters, give_up=Reason.RESTARTS_EXHAUSTED, why=why)
    return Verdict(after, delay)


def _without_progress(
    restarts: Restarts, entry: AttemptStatus, cause: Cause, *, progressed: bool, charged: bool
) -> Restarts:
    """Consecutive failed attempts without progress.

    An attempt that lost a machine before its first step says nothing about the program: it does not count
    here, only on its own budget. Otherwise three nodes lost in a row would end a healthy run.
    """
    if progressed:
        return replace(restarts, without_progress=0)
    spared = cause.failure_class == FailureClass.INFRASTRUCTURE and not entry.first_step_time
    return (
        restarts
        if spared or not charged
        else replace(restarts, without_progress=restarts.without_progress + 1)
    )


def _fruitless(status: Status) -> int:
    """Failed attempts before the current one, newest first, that took no step: they pace the back-off too."""
    count = 0
    for entry in reversed([e for e in status.attempts if e.attempt < status.attempt]):
        if entry.first_step_time or entry.cause is None:
            break
        count += 1
    return count


def _backoff(policy: RestartPolicy, k: int) -> float:
    """Seconds before the attempt after the k-th failure in a row without progress."""
    return float(min(policy.backoff_seconds * 2 ** min(k - 1, MOST_DOUBLINGS), policy.backoff_max_seconds))
