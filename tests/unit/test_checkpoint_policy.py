"""Which commits an attempt may start from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainyard.checkpoint.policy import candidates, fence_reason
from trainyard_api.checkpoints import Record


def fence(seq: int, attempt: int, parent: int, policy: str) -> Record:
    return Record(
        kind="fence",
        seq=seq,
        run="r",
        attempt=attempt,
        step=0,
        time=0.0,
        parent=parent,
        reason=fence_reason(policy),
    )


def commit(seq: int, attempt: int, step: int) -> Record:
    return Record(kind="commit", seq=seq, run="r", attempt=attempt, step=step, time=0.0)


def steps(records: list[Record]) -> list[int]:
    return [r.step for r in records]


OLD = [fence(1, 1, 0, "auto"), commit(2, 1, 10), commit(3, 1, 20), commit(4, 1, 30)]


def test_auto_takes_the_newest_first_and_may_begin_from_the_beginning() -> None:
    found = candidates(OLD, "auto", restart=False)
    assert (steps(found.records), found.required) == ([30, 20, 10], False)
    assert candidates([], "auto", restart=False).records == []


def test_required_is_never_the_beginning() -> None:
    assert candidates([], "required", restart=False).required
    assert steps(candidates(OLD, "required", restart=True).records) == [30, 20, 10]


def test_never_is_followed_once_and_not_by_each_restart() -> None:
    assert candidates(OLD, "never", restart=False).records == []
    # The first attempt of a TrainingRun over an older log is a restart of nobody's: the newest fence says auto.
    assert candidates(OLD, "never", restart=True).records == []
    log = [*OLD, fence(5, 2, 0, "never"), commit(6, 2, 5)]
    assert steps(candidates(log, "never", restart=True).records) == [5]
    assert candidates(log, "never", restart=False).records == []
    # The fence that followed it was pruned: the one after it went on from one of its commits.
    pruned = [commit(6, 2, 5), commit(7, 2, 8), fence(8, 3, 7, "never")]
    assert steps(candidates(pruned, "never", restart=True).records) == [8, 5]


def test_a_step_is_taken_once_and_stays_the_fall_back() -> None:
    found = candidates(OLD, "20", restart=False)
    assert (steps(found.records), found.required) == ([20], True)
    log = [*OLD, fence(5, 2, 3, "20"), commit(6, 2, 25)]
    assert steps(candidates(log, "20", restart=True).records) == [25, 20, 10]
    assert steps(candidates(log, "20", restart=False).records) == [20]
    assert candidates(OLD, "15", restart=False).records == []


def test_a_changed_policy_is_followed_anew() -> None:
    log = [*OLD, fence(5, 2, 3, "20"), commit(6, 2, 25)]
    assert steps(candidates(log, "10", restart=True).records) == [10]


@given(st.lists(st.integers(0, 3), max_size=12), st.sampled_from(["never", "10", "auto"]))
def test_a_restart_never_loses_what_was_committed_since_the_policy_was_followed(
    commits: list[int], policy: str
) -> None:
    """Attempts that each resume by the policy and commit some steps: the newest commit of any of them comes first."""
    log, attempt, step, first = list(OLD), 1, 100, True
    for count in commits:
        attempt += 1
        found = candidates(log, policy, restart=not first).records
        newest = found[0] if found else None
        if not first and step > 100:
            assert newest is not None and newest.step == step
        log.append(fence(len(log) + 1, attempt, newest.seq if newest else 0, policy))
        first = False
        for _ in range(count):
            step += 1
            log.append(commit(len(log) + 1, attempt, step))
