"""Which of several dead ranks is the cause, and which only heard the echo of another's death."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainyard_agent.log import one_line
from trainyard_api.protocol import Failure

# What gloo, NCCL, the TCPStore and the kernel say to the peers of a rank that died. Texts of
# gloo/transport/tcp (pair.cc, unbound_buffer.cc), nccl (ncclGetErrorString), c10d (TCPStore, ProcessGroupNCCL).
_ECHO = re.compile(
    r"connection (was )?(likely )?closed|connection reset|connection refused|broken pipe|read timeout"
    r"|timed out waiting|wait timeout|socket timeout|application timeout|failed to (recv|connect)|recvvalue failed"
    r"|sendbytes failed|no route to host|nccl ?remote ?error|remote process exited|network error"
    r"|nccl communicator was aborted|communicator is aborted|watchdog caught collective"
    r"|connectfullmesh|gloo.{0,80}timeout|distnetworkerror|diststoreerror"
    r"|^peerfailed: ",  # trainyard.failure: ended because of another rank
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Death:
    """How one local worker ended, as the launcher saw it."""

    rank: int
    local_rank: int
    exit_code: int
    """>= 0 exit code, < 0 minus the signal's number."""
    time: float
    """Unix seconds: of the exception if there was one, else of the death."""
    exception: str = ""
    message: str = ""
    text: str = ""
    """The exception and those it came from; searched for echoes."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Death:
        """From a line of the launcher. Raises KeyError, TypeError or ValueError if it is not one."""
        return cls(
            rank=int(data["rank"]),
            local_rank=int(data["local_rank"]),
            exit_code=int(data["exit_code"]),
            time=float(data["time"]),
            exception=str(data.get("exception", "")),
            message=str(data.get("message", "")),
            text=str(data.get("text", "")),
        )


def is_echo(death: Death) -> bool:
    """True for an exception that a peer's death explains. A death by signal is nobody's echo, except SIGTERM:
    torchelastic sends that to the siblings of a dead worker."""
    if death.exit_code < 0:
        return death.exit_code == -signal.SIGTERM
    return bool(death.exception) and bool(_ECHO.search(f"{death.exception}: {death.message}\n{death.text}"))


def signal_name(number: int) -> str:
    """SIGKILL for 9; "signal 99" for what has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe(death: Death) -> str:
    """One line for people when there is no exception's message."""
    if death.exit_code < 0:
        return f"killed by signal {-death.exit_code} ({signal_name(-death.exit_code)})"
    return f"exited with code {death.exit_code}"


def root_cause(attempt: int, deaths: Sequence[Death]) -> Failure:
    """The first death that is nobody's echo; the first of all if every one is. Raises ValueError for none."""
    first = min(deaths, key=lambda d: (is_echo(d), d.time, d.rank))
    return Failure(
        attempt=attempt,
        rank=first.rank,
        local_rank=first.local_rank,
        exit_code=first.exit_code,
        exception=one_line(first.exception, 200),
        message=one_line(first.message) or describe(first),
        time=first.time,
        collateral=is_echo(first),
    )
