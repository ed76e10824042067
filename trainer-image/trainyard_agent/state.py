"""What the agent knows and what it makes of a directive: values and pure functions, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from trainyard_agent.log import one_line
from trainyard_api.protocol import (
    Action,
    AgentPhase,
    Beat,
    Checkpoint,
    Directive,
    Failure,
    Progress,
    Resumed,
)

MAX_WARNINGS = 4
_WITH_WORKERS = (AgentPhase.STARTING, AgentPhase.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a beat says, and the fence."""

    beat: Beat
    newest: int = 0
    """Highest attempt that was ever heard of. Nothing older is run, ever."""
    launched: int = 0
    """Attempt whose workers were started last; it is never started again."""

    @property
    def running(self) -> bool:
        """Workers of `launched` may live."""
        return self.beat.phase in _WITH_WORKERS


class Verb(StrEnum):
    """What to do about a directive."""

    NOTHING = "nothing"
    REFUSE = "refuse"
    """It is about an attempt older than one that was heard of."""
    HOLD = "hold"
    LAUNCH = "launch"
    EXIT = "exit"


def decide(state: State, directive: Directive) -> Verb:
    """What `directive` asks for in `state`.

    Answers of two connections may arrive in either order; the attempt decides, so a late one changes nothing.
    """
    if directive.action is Action.EXIT:
        return Verb.EXIT
    if state.beat.phase is AgentPhase.DRAINING:
        return Verb.NOTHING
    if directive.attempt < state.newest:
        return Verb.REFUSE
    if directive.action is Action.HOLD:
        return Verb.HOLD if directive.attempt > state.beat.attempt else Verb.NOTHING
    return Verb.LAUNCH if directive.attempt > state.launched else Verb.NOTHING


def problem_of(directive: Directive) -> str:
    """Why a RUN cannot be carried out as it is; empty when it can."""
    checks = {
        "attempt must be at least 1": directive.attempt >= 1,
        "procsPerNode must be at least 1": directive.procs_per_node >= 1,
        "nodeRank must be below nodes": 0 <= directive.node_rank < directive.nodes,
        "masterAddr is missing": bool(directive.master_addr),
        "masterPort must be a TCP port": 0 < directive.master_port < 65536,
    }
    return "; ".join(text for text, good in checks.items() if not good)


def _with(state: State, **changes: Any) -> State:
    return replace(state, beat=replace(state.beat, **changes))


def saw(state: State, directive: Directive) -> State:
    """The directive was obeyed (or asked for nothing)."""
    state = replace(state, newest=max(state.newest, directive.attempt))
    return _with(state, seen=directive.revision)


def stopping(state: State) -> State:
    return _with(state, phase=AgentPhase.STOPPING)


def held(state: State, attempt: int) -> State:
    """No workers live; waiting for `attempt`. What an older attempt did was taken note of by then."""
    return replace(
        _with(state, attempt=attempt, phase=AgentPhase.IDLE, progress=None, resumed=None, failure=None),
        newest=max(state.newest, attempt),
    )


def launched(state: State, attempt: int) -> State:
    state = held(state, attempt)
    return replace(_with(state, phase=AgentPhase.STARTING), launched=attempt)


def progressed(state: State, attempt: int, progress: Progress) -> State:
    """Local rank 0 took a step. Ignored when it is of another attempt or the attempt is over."""
    beat = state.beat
    if attempt != beat.attempt or not state.running:
        return state
    if beat.phase is AgentPhase.RUNNING:
        return _with(state, progress=progress)
    resumed = beat.resumed or Resumed(attempt=attempt, step=max(progress.step - 1, 0))
    return _with(
        state,
        phase=AgentPhase.RUNNING,
        progress=progress,
        resumed=replace(resumed, first_step_time=progress.time),
    )


def resumed(state: State, where: Resumed) -> State:
    """Workers said where they start from. Ignored when it is of another attempt or the attempt is over."""
    if where.attempt != state.beat.attempt or not state.running:
        return state
    before = state.beat.resumed
    return _with(state, resumed=replace(where, first_step_time=before.first_step_time if before else None))


def committed(state: State, checkpoint: Checkpoint) -> State:
    """A commit is durable. Whatever the attempt: the newest one counts."""
    before = state.beat.checkpoint
    if before and before.seq >= checkpoint.seq:
        return state
    return _with(state, checkpoint=checkpoint)


def failed(state: State, failure: Failure) -> State:
    return _with(state, phase=AgentPhase.FAILED, failure=failure)


def succeeded(state: State) -> State:
    return _with(state, phase=AgentPhase.SUCCEEDED)


def draining(state: State) -> State:
    return _with(state, phase=AgentPhase.DRAINING)


def warm(state: State, ready: bool) -> State:
    return _with(state, ready=ready)


def blocked(state: State, message: str) -> State:
    """No attempt can succeed here until somebody changes something."""
    return _with(state, blocked=one_line(message))


def warned(state: State, message: str) -> State:
    """Keeps the newest `MAX_WARNINGS` different ones."""
    line = one_line(message, 256)
    kept = [w for w in state.beat.warnings if w != line]
    return _with(state, warnings=[*kept, line][-MAX_WARNINGS:])


def urgent(before: Beat, after: Beat) -> bool:
    """Whether the change should not wait for the next beat: all but steps after the first."""
    return replace(before, progress=None, seen="") != replace(after, progress=None, seen="")
