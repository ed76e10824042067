"""Time as a dependency, so that tests need not wait for it."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """The two clocks of a process, and waiting. All values are seconds."""

    def monotonic(self) -> float:
        """For durations and deadlines; never goes back."""
        ...

    def time(self) -> float:
        """Unix seconds, for what people or other processes read."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The real one."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
