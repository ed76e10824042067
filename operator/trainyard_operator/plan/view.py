"""What the decisions share: the observation, and what follows from it at once."""

from __future__ import annotations

from dataclasses import dataclass

from trainyard_api.v1alpha1 import AttemptStatus, Spec, Status, TrainingRun
from trainyard_operator.plan.membership import MOST_NODES, Gang, gang_of, told
from trainyard_operator.plan.model import Observed, PlanSettings
from trainyard_operator.plan.times import parse


@dataclass(frozen=True, slots=True)
class View:
    """One run at one moment."""

    observed: Observed
    settings: PlanSettings
    gang: Gang
    entry: AttemptStatus
    """History's line of the current attempt (made up if somebody removed it)."""
    run_time: float | None
    """When the gang of the current attempt was told to run; None: not yet."""

    @classmethod
    def of(cls, observed: Observed, settings: PlanSettings) -> View:
        status = observed.run.status
        entry = entry_of(status, status.attempt) or AttemptStatus(attempt=status.attempt)
        run_time = parse(entry.run_time)
        size = observed.run.spec.nodes.desired
        size = max(1, size)
        if run_time is not None and 0 < status.nodes.desired <= MOST_NODES:
            size = status.nodes.desired  # a change of the size takes effect with the next attempt
        if run_time is None and told(observed, status.attempt, size):
            run_time = observed.now  # persisted before anyone is told; absent only if somebody edited it away
        gang = gang_of(observed, settings, attempt=status.attempt, size=size, run_time=run_time)
        return cls(observed, settings, gang, entry, run_time)

    @property
    def run(self) -> TrainingRun:
        return self.observed.run

    @property
    def spec(self) -> Spec:
        return self.observed.run.spec

    @property
    def status(self) -> Status:
        return self.observed.run.status

    @property
    def now(self) -> float:
        return self.observed.now

    @property
    def attempt(self) -> int:
        return self.observed.run.status.attempt

    @property
    def started(self) -> bool:
        return self.run_time is not None

    @property
    def previous(self) -> AttemptStatus | None:
        """The attempt before, if history still has it."""
        return entry_of(self.status, self.attempt - 1)

    @property
    def restart(self) -> bool:
        """Whether the current attempt follows a failed one."""
        return self.previous is not None and self.previous.cause is not None

    @property
    def active_seconds(self) -> float:
        """How long the run has been active (not suspended), over all its periods."""
        since = parse(self.status.active_since)
        return self.status.active_seconds + (max(0.0, self.now - since) if since is not None else 0.0)


def entry_of(status: Status, attempt: int) -> AttemptStatus | None:
    """History's line of `attempt`."""
    return next((e for e in reversed(status.attempts) if e.attempt == attempt), None)
