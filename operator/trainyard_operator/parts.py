"""The parts of the process: tasks that must all live, or the process ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any


class PartEndedError(Exception):
    """A part ended by itself; its own error, if it had one, is the cause."""


class Parts:
    """Long-lived tasks by name."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], str] = {}

    def spawn(self, name: str, part: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts a part."""
        task = asyncio.create_task(part, name=name)
        self._tasks[task] = name
        return task

    async def guard(self, step: Coroutine[Any, Any, Any]) -> None:
        """Awaits `step`. Raises its error, or PartEndedError at once when a part ends meanwhile."""
        task = asyncio.create_task(step, name="step")
        try:
            done, _ = await asyncio.wait((task, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                if part is not task:
                    error = None if part.cancelled() else part.exception()
                    raise PartEndedError(f"{self._tasks[part]} ended by itself") from error
            task.result()
        finally:
            task.cancel()

    async def end(self, others: Iterable[asyncio.Task[Any]] = ()) -> None:
        """Cancels all parts and `others`, and waits for them; their errors were told before, or are of no use."""
        tasks = (*others, *self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
