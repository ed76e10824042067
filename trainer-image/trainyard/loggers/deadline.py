"""A call into a vendor's SDK that must come back: most of them retry for minutes when their server is away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

CONNECT_SECONDS = 30.0
"""For the first contact with a server, at the start of a fit."""
CALL_SECONDS = 10.0
"""For a call during training."""
FAILED_SECONDS = 4.0
"""For what is left to do after a failure: the other ranks have to end within 10 s."""

_T = TypeVar("_T")


def bounded(call: Callable[[], _T], seconds: float, what: str) -> _T:
    """`call()` in a thread. Raises what it raises; TimeoutError when it takes longer (then the thread is left behind)."""
    answer: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(call())
        except BaseException as error:  # it belongs to the caller
            errors.append(error)

    # A daemon, so that it cannot hold up the interpreter's end.
    thread = threading.Thread(target=run, name="trainyard-logger", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answer:
        raise TimeoutError(f"{what} gave no answer within {seconds:g} s")
    return answer[0]
