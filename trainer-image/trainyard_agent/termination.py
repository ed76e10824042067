"""The termination message: what the pod's status says of the agent when the agent can no longer say it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from trainyard_agent.log import one_line
from trainyard_api.protocol import Beat, Failure

MAX_BYTES = 4096
"""The kubelet keeps no more (kubernetes.io/docs: "Customizing the termination message")."""


def render(
    *,
    attempt: int,
    outcome: str,
    exit_code: int | None,
    step: int | None,
    failure: Failure | None,
    message: str = "",
) -> str:
    """JSON of at most `MAX_BYTES` bytes: attempt, outcome, exitCode, rank, exception, message, step."""
    value = {
        "attempt": attempt,
        "outcome": outcome,
        "exitCode": exit_code,
        "rank": failure.rank if failure else None,
        "exception": one_line(failure.exception, 200) if failure else "",
        "message": one_line(message or (failure.message if failure else ""), 1024),
        "step": step,
    }
    # At most 1024 characters of 3 bytes; an astral character could double that, so cut until it fits.
    while (
        len(text := json.dumps(value, ensure_ascii=False)) and len(text.encode(errors="replace")) >= MAX_BYTES
    ):
        value["message"] = str(value["message"])[:-64]
    return text


def of_beat(beat: Beat, *, outcome: str, exit_code: int | None, message: str) -> str:
    """The message of an agent that says `beat`; `message` instead of the failure's, if it is not empty."""
    return render(
        attempt=beat.attempt,
        outcome=outcome,
        exit_code=exit_code,
        step=beat.progress.step if beat.progress else None,
        failure=beat.failure,
        message=message,
    )


def exit_code(failure: Failure | None) -> int:
    """Of an agent that has to say by itself how its workers ended; a signal as a shell says it."""
    if failure is None:
        return 0
    if failure.exit_code is None:
        return 1
    return failure.exit_code if failure.exit_code >= 0 else 128 - failure.exit_code


def write(path: Path, text: str) -> None:
    """Replaces the file's content in place: it is a bind mount, so it can be neither renamed nor created anew."""
    with suppress(OSError):
        path.write_text(text, encoding="utf-8", errors="replace")
