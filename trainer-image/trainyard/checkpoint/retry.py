"""Trying again: exponential back-off with full jitter, bounded in time; slower where the server asks for it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from trainyard.checkpoint.errors import StoreUnavailable

T = TypeVar("T")

_SLOW_FIRST = 1.0
_SLOW_LONGEST = 30.0
"""Seconds, after SlowDown: thousands of clients share what is too busy."""


def with_retries(
    call: Callable[[], T],
    *,
    seconds: float,
    on_retry: Callable[[StoreUnavailable, int], None] | None = None,
    first: float = 0.1,
    longest: float = 5.0,
) -> T:
    """What `call` returns, repeated after StoreUnavailable for up to `seconds`; then the last error is raised.

    `on_retry(error, tries)` may raise to give up earlier. Back-off: "Exponential Backoff And Jitter" (AWS
    Architecture Blog, 2015), the full-jitter form; longer after SlowDown, and never shorter than the server's Retry-After.
    """
    deadline = time.monotonic() + seconds
    pause, tries = first, 0
    while True:
        try:
            return call()
        except StoreUnavailable as error:
            tries += 1
            if time.monotonic() >= deadline:
                raise
            if on_retry is not None:
                on_retry(error, tries)
            if error.slow_down:
                pause, longest = max(pause, _SLOW_FIRST), max(longest, _SLOW_LONGEST)
            wait = pause_after(error, pause)
        time.sleep(min(wait, max(0.0, deadline - time.monotonic())))
        pause = min(pause * 2, longest)


def pause_after(error: StoreUnavailable, pause: float) -> float:
    """Seconds to wait: a random part of `pause`, on top of what the server named."""
    return (error.retry_after or 0.0) + random.uniform(pause / 4, pause)  # noqa: S311
