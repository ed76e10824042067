"""Trying again: exponential back-off with full jitter, bounded in time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from trainyard.checkpoint.errors import StoreUnavailable

T = TypeVar("T")


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
    Architecture Blog, 2015), the full-jitter form.
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
        time.sleep(min(random.uniform(pause / 4, pause), max(0.0, deadline - time.monotonic())))  # noqa: S311
        pause = min(pause * 2, longest)
