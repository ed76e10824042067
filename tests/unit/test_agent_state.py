"""What the agent makes of directives and of what its children say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainyard_agent import hearsay
from trainyard_agent import state as states
from trainyard_agent.state import State, Verb, decide
from trainyard_api.protocol import Action, AgentPhase, Beat, Checkpoint, Directive, Failure, Progress, Resumed

IDLE = State(beat=Beat(pod_name="p", pod_uid="u", incarnation="i", node_index=0))
RUN = Directive(
    action=Action.RUN, attempt=3, nodes=2, procs_per_node=2, master_addr="10.0.0.1", master_port=29503
)


def running(attempt: int = 3) -> State:
    state = states.launched(IDLE, attempt)
    return states.progressed(state, attempt, Progress(step=11, time=5.0))


def hold(attempt: int) -> Directive:
    return Directive(action=Action.HOLD, attempt=attempt)


@pytest.mark.parametrize(
    ("state", "directive", "verb"),
    [
        (IDLE, hold(0), Verb.NOTHING),
        (IDLE, hold(1), Verb.HOLD),
        (IDLE, RUN, Verb.LAUNCH),
        (states.held(IDLE, 3), RUN, Verb.LAUNCH),
        (states.held(IDLE, 3), hold(3), Verb.NOTHING),
        (states.held(IDLE, 4), RUN, Verb.REFUSE),
        (running(), RUN, Verb.NOTHING),
        (running(), replace(RUN, attempt=2), Verb.REFUSE),
        (running(), replace(RUN, attempt=4), Verb.LAUNCH),
        (running(), hold(3), Verb.NOTHING),
        (running(), hold(2), Verb.REFUSE),
        (running(), hold(4), Verb.HOLD),
        # Nothing can re-join an attempt.
        (states.failed(running(), Failure(attempt=3)), RUN, Verb.NOTHING),
        (states.succeeded(running()), RUN, Verb.NOTHING),
        (states.draining(running()), replace(RUN, attempt=4), Verb.NOTHING),
        (states.draining(running()), Directive(action=Action.EXIT), Verb.EXIT),
        (running(), Directive(action=Action.EXIT, attempt=1), Verb.EXIT),
    ],
)
def test_decide(state: State, directive: Directive, verb: Verb) -> None:
    assert decide(state, directive) is verb


def test_a_newer_attempt_that_was_only_heard_of_fences_as_well() -> None:
    state = states.saw(running(3), hold(7))
    assert decide(state, replace(RUN, attempt=6)) is Verb.REFUSE
    assert state.beat.seen == hold(7).revision


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"attempt": 0}, "attempt"),
        ({"procs_per_node": 0}, "procsPerNode"),
        ({"node_rank": 2}, "nodeRank"),
        ({"master_addr": ""}, "masterAddr"),
        ({"master_port": 0}, "masterPort"),
    ],
)
def test_a_run_that_cannot_be_carried_out_is_named(change: dict[str, object], word: str) -> None:
    assert states.problem_of(RUN) == ""
    assert word in states.problem_of(replace(RUN, **change))  # type: ignore[arg-type]


def test_first_step_makes_it_running_and_sets_its_time_once() -> None:
    state = states.launched(IDLE, 3)
    state = states.resumed(state, Resumed(attempt=3, step=10, uri="s3://b/c"))
    assert state.beat.phase is AgentPhase.STARTING and state.beat.resumed.first_step_time is None
    state = states.progressed(state, 3, Progress(step=11, time=5.0))
    later = states.progressed(state, 3, Progress(step=12, time=6.0))
    assert later.beat.phase is AgentPhase.RUNNING and later.beat.progress.step == 12
    assert later.beat.resumed == Resumed(attempt=3, step=10, uri="s3://b/c", first_step_time=5.0)
    assert states.urgent(states.launched(IDLE, 3).beat, state.beat)
    assert not states.urgent(state.beat, later.beat)


def test_program_that_never_says_where_it_resumed_still_has_a_first_step() -> None:
    assert running().beat.resumed == Resumed(attempt=3, step=10, first_step_time=5.0)


def test_words_of_another_attempt_or_after_the_end_change_nothing() -> None:
    over = states.failed(running(), Failure(attempt=3))
    for state, attempt in ((running(), 2), (over, 3), (states.held(running(), 4), 3)):
        assert states.progressed(state, attempt, Progress(step=99, time=9.0)) == state
        assert states.resumed(state, Resumed(attempt=attempt, step=99)) == state


def test_a_new_attempt_begins_with_a_clean_slate() -> None:
    state = states.failed(running(), Failure(attempt=3))
    state = states.launched(state, 4)
    beat = state.beat
    assert (beat.attempt, beat.phase, beat.progress, beat.resumed, beat.failure) == (
        4, AgentPhase.STARTING, None, None, None,
    )  # fmt: skip


def test_the_newest_commit_counts() -> None:
    new, line = hearsay.uploader_said(
        IDLE, {"op": "committed", "step": 20, "seq": 4, "uri": "u", "time": 1.0}
    )
    assert new.beat.checkpoint == Checkpoint(step=20, seq=4, uri="u", time=1.0) and "step 20" in line
    costs = {"size": 9, "seconds": 1.5, "stallSeconds": 0.25, "reason": "steps"}
    told, _ = hearsay.uploader_said(
        IDLE, {"op": "committed", "step": 20, "seq": 4, "uri": "u", "time": 1.0, **costs}
    )
    assert told.beat.checkpoint == Checkpoint(
        step=20, seq=4, uri="u", time=1.0, reason="steps", bytes=9, upload_seconds=1.5, stall_seconds=0.25
    )
    old, _ = hearsay.uploader_said(new, {"op": "committed", "step": 10, "seq": 3, "uri": "u", "time": 2.0})
    assert old == new
    with pytest.raises(KeyError):
        hearsay.uploader_said(IDLE, {"op": "committed"})


def test_warnings_are_short_few_and_different() -> None:
    state = IDLE
    for number in range(6):
        state = states.warned(states.warned(state, f"w{number}\n" + "x" * 500), "same")
    assert len(state.beat.warnings) == 4 and state.beat.warnings[-1] == "same"
    assert all(len(w) <= 256 and "\n" not in w for w in state.beat.warnings)


@pytest.mark.parametrize(
    "message", [{"op": "progress"}, {"op": "progress", "attempt": "x", "step": 1}, {"op": "resumed"}]
)
def test_nonsense_of_a_worker_is_refused(message: dict[str, object]) -> None:
    with pytest.raises((KeyError, ValueError, TypeError)):
        hearsay.worker_said(running(), message)
    assert hearsay.worker_said(running(), {"op": "unknown"}) == (running(), "")


def test_loss_that_json_cannot_carry_is_left_out() -> None:
    message = {"op": "progress", "attempt": 3, "step": 12, "loss": float("nan"), "time": 6.0}
    new, _ = hearsay.worker_said(running(), message)
    assert new.beat.progress == Progress(step=12, loss=None, time=6.0)
