"""How often to save: Young's interval, from what a save costs and how often the run fails. Pure.

A run that saves every W seconds gives C/W of its time to the stalls (C seconds each), and loses W/2 to each failure, of
which there is one in M seconds: the sum C/W + W/2M is least at W = sqrt(2 C M) (J. W. Young, "A first order approximation
to the optimum checkpoint interval", CACM 17(9), 1974). That a commit is there only some seconds after its stall adds
the same to each failure whatever W is, so it does not move the optimum.

J. T. Daly's higher-order form (FGCS 22(3), 2006), W (1 + x/3 + x^2/9) - C with x = sqrt(C/2M), is left out: stalls
are held to 1 % of the time, so x is at most 0.01 wherever the formula decides, and the two differ by less than 0.7 %. A W
that is off by a quarter costs 2.5 % more than the best one, so M and C need not be known well either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from trainyard_api.checkpoints import Record

STALL_SHARE = 0.01
"""Of the time of a run that its saves may take at most."""
CEILING_SECONDS = 1800.0
LEAST_SECONDS = 5.0
"""Below it a shorter interval gains nothing that anybody would notice, and fills the bucket's log."""
FIRST_SECONDS = 10.0
"""After the start of a run that has never saved: its first save is there to be measured."""
PRIOR_SECONDS = 6 * 3600.0
PRIOR_FAILURES = 1.0
"""What is believed of a run of which nothing is known: a Gamma distribution of its rate of failures, worth one failure in six
hours. A gang of 1000 nodes does worse, one node much better; what a run lives through itself soon outweighs it."""
_SAVED_AT_THE_END = frozenset(("stop", "exception", "end"))


@dataclass(frozen=True, slots=True)
class Life:
    """How long a run has trained, over all its attempts, and how often that ended with a loss of steps."""

    seconds: float = 0.0
    failures: int = 0

    @property
    def mttf(self) -> float:
        """Seconds to the next failure: the posterior mean of the rate, inverted."""
        return (PRIOR_SECONDS + self.seconds) / (PRIOR_FAILURES + self.failures)


def life_of(records: Iterable[Record], *, now: float, ceiling: float = CEILING_SECONDS) -> Life:
    """Of a run whose log this is, before the fence of the attempt that asks. `now`: Unix seconds.

    Each commit says what life the run had until then, so it does not matter what was pruned. What came after the newest
    commit is added here. Nobody knows when an attempt died: between its last record and the next fence it may have been
    suspended, or queued for days. So what it lived after that record counts as no more than the time between its last two
    records, or than `ceiling` where it has but one. An attempt whose last commit was made because it was asked to
    stop, or because it failed with its state sound, lost nothing and is no failure.
    """
    ordered = sorted(records, key=lambda r: (r.attempt, r.seq))
    commits = [r for r in ordered if r.kind == "commit"]
    life, tail, before = Life(), ordered, list[float]()
    if commits:
        newest = commits[-1]
        life = Life(newest.alive_seconds, newest.failures)
        tail = [newest, *(r for r in ordered if (r.attempt, r.seq) > (newest.attempt, newest.seq))]
        before = [r.time for r in ordered if r.attempt == newest.attempt and r.seq < newest.seq]
    ends = [*(r.time for r in tail[1:]), now]
    seconds, failures = life.seconds, life.failures
    for record, end in zip(tail, ends, strict=False):  # an empty log has no ends either
        bound = ceiling
        if record.kind == "commit":
            if record.reason in _SAVED_AT_THE_END:
                continue
            if before:
                bound = min(ceiling, max(0.0, record.time - max(before)))
        seconds += min(max(0.0, end - record.time), bound)
        failures += 1
    return Life(seconds, failures)


@dataclass(frozen=True, slots=True)
class Choice:
    """An interval and where it comes from."""

    seconds: float
    stall: float
    commit: float
    mttf: float
    bound: str = ""
    """What kept Young's interval from being taken; empty: nothing did."""

    def __str__(self) -> str:
        said = (
            f"{self.seconds:.0f} s: a save stops the training for {self.stall:.3g} s and is committed after "
            f"{self.commit:.3g} s, and a failure is expected in {self.mttf / 3600:.3g} h"
        )
        return f"{said}; {self.bound}" if self.bound else said


def young(stall: float, mttf: float) -> float:
    """Seconds between two saves. Both arguments in seconds."""
    return math.sqrt(2 * stall * mttf)


def choose(*, stall: float, commit: float, mttf: float, ceiling: float = CEILING_SECONDS) -> Choice:
    """Young's interval within bounds, of which those from below win. All in seconds."""
    best = young(stall, mttf)
    bounds = [
        (stall / STALL_SHARE, f"not more often, for saves are to take at most {STALL_SHARE:.0%} of the time"),
        (commit, "not more often than a save is committed"),
        (LEAST_SECONDS, f"not more often than every {LEAST_SECONDS:g} s"),
    ]
    floor, why = max(bounds)
    if best < floor:
        return Choice(floor, stall, commit, mttf, why)
    if best > ceiling:
        seconds = max(floor, ceiling)
        return Choice(
            seconds,
            stall,
            commit,
            mttf,
            f"not less often than every {ceiling:g} s" if seconds == ceiling else why,
        )
    return Choice(best, stall, commit, mttf)
