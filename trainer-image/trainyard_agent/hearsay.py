"""What workers and the uploader say, as pure functions: the state before and a message to the state after and a log line."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from trainyard_agent import state as states
from trainyard_agent.inbox import parse_progress, parse_resumed
from trainyard_agent.log import one_line
from trainyard_agent.state import State
from trainyard_api.protocol import AgentPhase, Checkpoint

_N = TypeVar("_N", int, float)


def worker_said(state: State, message: dict[str, Any]) -> tuple[State, str]:
    """Progress, or where the attempt starts. Raises ValueError, KeyError or TypeError for nonsense."""
    op = message.get("op")
    if op == "progress":
        attempt, progress = parse_progress(message)
        new = states.progressed(state, attempt, progress)
        first = state.beat.phase is AgentPhase.STARTING and new.beat.phase is AgentPhase.RUNNING
        return new, f"attempt {attempt}: first step taken (step {progress.step})" if first else ""
    if op == "resumed":
        where = parse_resumed(message)
        passed = f"; passed over newer ones: {where.fell_back}" if where.fell_back else ""
        line = f"attempt {where.attempt}: goes on from step {where.step} ({where.uri or 'nothing saved'}){passed}"
        return states.resumed(state, where), line
    return state, ""


def uploader_said(state: State, message: dict[str, Any]) -> tuple[State, str]:
    """A commit, or something that people should know. Raises ValueError, KeyError or TypeError for nonsense."""
    op = message.get("op")
    if op == "committed":
        commit = Checkpoint(
            step=int(message["step"]),
            seq=int(message["seq"]),
            uri=one_line(message.get("uri", "")),
            time=float(message.get("time") or time.time()),
            reason=one_line(message.get("reason", "")),
            bytes=_number(message, "size", int),
            upload_seconds=_number(message, "seconds", float),
            stall_seconds=_number(message, "stallSeconds", float),
        )
        return states.committed(state, commit), f"checkpoint of step {commit.step} committed ({commit.uri})"
    if op == "refused":
        return states.blocked(state, message["message"]), f"checkpoints: {message['message']}"
    if op == "warning":
        line = f"checkpoints: {message.get('message', '')}"
        return states.warned(state, line), f"warning: {line}"
    return state, ""


def _number(message: dict[str, Any], name: str, kind: type[_N]) -> _N | None:
    """None if it does not say. Raises ValueError or TypeError."""
    value = message.get(name)
    return None if value is None else kind(value)
