"""What is said of a failure, to the other ranks and to whoever started the process."""

from __future__ import annotations

import json
import os
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trainyard.failure.errors import SIGTERM_CODE, PeerFailed
from trainyard_api.contract import Env

_LONGEST_TRACE = 16_000
"""Characters, from its end."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a rank ends."""

    rank: int
    kind: str
    """Name of the exception's type; empty if there was none."""
    message: str
    trace: str = ""
    code: int = 1
    """What the other ranks' processes end with."""

    @classmethod
    def of(cls, error: BaseException, rank: int, code: int = 1) -> Cause:
        """Of an exception that rank `rank` caught."""
        text = "".join(traceback.format_exception(error))
        return cls(rank, type(error).__name__, str(error), text[-_LONGEST_TRACE:], code)

    @classmethod
    def sigterm(cls, rank: int) -> Cause:
        """Nothing is there that could be saved."""
        return cls(rank, "", "it was ended by SIGTERM", code=SIGTERM_CODE)

    @classmethod
    def from_json(cls, text: str | bytes) -> Cause:
        """Raises ValueError or TypeError."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        said = f"{self.kind}: {self.message}" if self.kind and self.message else self.kind or self.message
        return f"rank {self.rank} failed: {said}"


def is_echo(error: BaseException) -> bool:
    """Whether it is what a rank meets because another one died."""
    from trainyard_agent.rootcause import _ECHO

    return isinstance(error, PeerFailed) or bool(_ECHO.search(f"{type(error).__name__}: {error}"))


def is_timeout(error: BaseException) -> bool:
    """Whether a collective took longer than its process group allows: texts of gloo and of ProcessGroupNCCL."""
    said = str(error).lower()
    return (
        "timed out waiting" in said
        or "watchdog caught collective" in said
        or ("timeout" in said and "gloo" in said)
    )


def record(error: BaseException) -> None:
    """For torchrun (its error file), and for the launcher of a TrainingRun. Never raises.

    At once, not when the exception has left the script: what comes in between may hang, or be ended.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    with suppress(Exception):
        if os.environ.get(Env.AGENT_SOCKET):
            from trainyard.elastic import notes

            notes.write(notes.note_of(error), notes.path_of(Path(path).parent, int(os.environ["LOCAL_RANK"])))
    with suppress(Exception):
        _write_error_file(error, Path(path))


def _write_error_file(error: BaseException, path: Path) -> None:
    """In torchelastic's format: `multiprocessing/errors/error_handler.py`, ErrorHandler.record_exception."""
    details = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(time.time()))}
    said = {"message": f"{type(error).__name__}: {error}", "extraInfo": details}
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"message": said}))
    draft.replace(path)
