"""Ending this process when its main thread may be stuck for good in a collective, a loader or an exit handler."""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

GRACE_ENV = "TRAINYARD_GRACE_SECONDS"
_DEFAULT_GRACE = 10.0
_FLUSH_SECONDS = 0.5
EXIT_SECONDS = 2.0
"""At the end of a process, for its exit handlers."""
_WENT_ON_SECONDS = 30.0
_exit_bound: list[tuple[float, int]] = []


def grace_seconds() -> float:
    """From the wish to stop to the end of the process. Raises ValueError."""
    text = os.environ.get(GRACE_ENV, "")
    try:
        return float(text) if text else _DEFAULT_GRACE
    except ValueError:
        raise ValueError(f"{GRACE_ENV}: {text!r} is not a number of seconds") from None


def stop_seconds() -> float:
    """Of these, from the wish to the end of the fit."""
    return max(1.0, grace_seconds() - EXIT_SECONDS)


def teardown_seconds() -> float:
    """What a rank that failed may take to come out of its entry point; the others have begun with that a moment later."""
    return max(1.0, grace_seconds() - 2 * EXIT_SECONDS)


def say(line: str) -> None:
    """To stderr, past Python's buffers and their locks."""
    with suppress(OSError):
        os.write(2, f"trainyard: {line}\n".encode(errors="replace"))


def end_process(code: int, line: str = "") -> NoReturn:
    """From any thread, whatever the others do."""
    if line:
        say(line)
    flusher = threading.Thread(target=_flush, daemon=True)
    flusher.start()
    flusher.join(_FLUSH_SECONDS)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


class Deadline:
    """Ends the process at a time, unless cancelled. Starting it twice keeps the earlier end."""

    def __init__(self) -> None:
        self._end: float | None = None
        self._cancelled = threading.Event()

    def start(self, seconds: float, code: int, line: str) -> None:
        if self._end is not None:
            return
        self._end = time.monotonic() + seconds
        # Not a threading.Timer: this is also called by a signal's handler, which must not take that module's locks.
        import _thread

        _thread.start_new_thread(self._run, (seconds, code, line))

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def runs(self) -> bool:
        return self._end is not None and not self._cancelled.is_set()

    @property
    def left(self) -> float:
        """Seconds; 0 if it was not started."""
        return 0.0 if self._end is None else max(0.0, self._end - time.monotonic())

    def _run(self, seconds: float, code: int, line: str) -> None:
        if not self._cancelled.wait(seconds):
            end_process(code, line)


def bound_interpreter_exit(seconds: float, code: int) -> None:
    """The process is to be gone in `seconds`, whatever its threads and exit handlers do once the script has ended.

    EXIT_SECONDS are granted to them in any case. A script that went on in spite of it all is left alone.
    """
    if not _exit_bound:
        # Called before the interpreter waits for threads; atexit's functions are called after that.
        register = getattr(threading, "_register_atexit", atexit.register)
        with suppress(RuntimeError):  # it is ending already
            register(_bound_exit)
    _exit_bound[:] = [(time.monotonic() + seconds, code)]


def _bound_exit() -> None:
    end, code = _exit_bound[-1]
    left = end - time.monotonic()
    if left < -_WENT_ON_SECONDS:
        return
    seconds = max(left, EXIT_SECONDS)
    Deadline().start(seconds, code, "")
    with suppress(ValueError):  # not the main thread
        # The last thing that still works when the interpreter has stopped its threads.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(seconds) + 1)
