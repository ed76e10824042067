"""What a worker leaves behind about its own end, for the launcher: one small JSON file per local rank."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from trainyard_agent.log import one_line

LONGEST_CHAIN = 6


@dataclass(frozen=True, slots=True)
class Note:
    exit_code: int
    exception: str
    """Type name."""
    message: str
    text: str
    """The exception and those that it came from."""
    time: float
    """Unix seconds: when it was raised."""


def path_of(work_dir: Path, local_rank: int) -> Path:
    return work_dir / f"note-{local_rank}.json"


def exit_code_of(error: BaseException) -> int:
    """What Python's interpreter makes of `error` at the top level (docs.python.org: SystemExit, sys.exit)."""
    if not isinstance(error, SystemExit):
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def chain(error: BaseException) -> list[BaseException]:
    """`error` and what it came from, newest first, as a traceback would show them."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found and len(found) < LONGEST_CHAIN:
        found.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def note_of(error: BaseException) -> Note:
    """What to say of a worker that ends because of `error`.

    For sys.exit(n) inside an except block, the exception that was handled is the reason.
    """
    errors = chain(error)
    cause = errors[0]
    code = exit_code_of(error)
    if isinstance(cause, SystemExit) and isinstance(cause.code, int | None):
        cause = errors[1] if len(errors) > 1 else cause
    said = (
        f"exited with code {code}"
        if isinstance(cause, SystemExit) and isinstance(cause.code, int)
        else str(cause)
    )
    return Note(
        exit_code=code,
        exception=type(cause).__name__,
        # What follows in a C++ error of torch is a stack.
        message=one_line(said.split("\nException raised from")[0]),
        text=one_line(" | ".join(f"{type(e).__name__}: {e}" for e in errors), 8192),
        time=time.time(),
    )


def write(note: Note, path: Path) -> None:
    """Atomically: who finds the file finds all of it. Raises OSError."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(note)))
    draft.replace(path)


def read(path: Path) -> Note | None:
    """None when there is none, or it is not readable."""
    try:
        return Note(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
