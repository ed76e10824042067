"""A keyed work queue: what is known of one object is handled by one worker at a time.

The semantics are those of client-go's workqueue (util/workqueue: queue.go, delaying_queue.go,
default_rate_limiters.go) in one asyncio class: adding a key that already waits changes nothing; adding a key
that is being handled makes it wait until that is over; nothing is ever lost.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, Protocol, TypeVar

from trainyard_operator.clock import Clock, SystemClock

K = TypeVar("K", bound=Hashable)

BASE_DELAY = 0.05
"""Seconds before the first retry."""
MAX_DELAY = 300.0
"""Seconds; no retry waits longer, unless the error itself asks for it."""
JITTER = 0.2
"""A retry waits between (1 - JITTER) and 1 of its nominal delay."""

log = logging.getLogger(__name__)


class QueueMetrics(Protocol):
    """What a queue tells about itself. Names and meanings are those of controller-runtime's metrics."""

    def depth(self, count: int) -> None:
        """Keys that wait for a worker now."""

    def added(self) -> None:
        """A key began to wait."""

    def retried(self) -> None:
        """A handler failed and its key will be tried again."""

    def queued(self, seconds: float) -> None:
        """How long a key waited for a worker, delays not counted."""

    def worked(self, seconds: float) -> None:
        """How long a handler took."""


class NoMetrics:
    """Tells nobody."""

    def depth(self, count: int) -> None: ...
    def added(self) -> None: ...
    def retried(self) -> None: ...
    def queued(self, seconds: float) -> None: ...
    def worked(self, seconds: float) -> None: ...


class WorkQueue(Generic[K]):
    """See the module. Not thread-safe: all methods are called in the event loop's thread."""

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        metrics: QueueMetrics | None = None,
        base_delay: float = BASE_DELAY,
        max_delay: float = MAX_DELAY,
        rng: random.Random | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._metrics = metrics or NoMetrics()
        self._base_delay = base_delay
        self._max_delay = max_delay
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._wanted: dict[K, float] = {}
        """Keys to handle and when they were added: they are in `_ready`, or in flight and added again."""
        self._in_flight: dict[K, float] = {}
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        """Times of `_due`, earliest first; entries that `_due` does not confirm are void."""
        self._order = itertools.count()
        self._timer_changed = asyncio.Event()
        self._failures: dict[K, int] = {}

    # ---- adding -------------------------------------------------------------------------------------

    def add(self, key: K) -> None:
        """Handle `key` as soon as a worker is free, and not again at the time of an earlier `add_after`."""
        self._due.pop(key, None)
        if key in self._wanted:
            return
        self._wanted[key] = self._clock.monotonic()
        self._metrics.added()
        if key not in self._in_flight:
            self._make_ready(key)

    def add_after(self, key: K, seconds: float) -> None:
        """`add(key)` in `seconds`, unless that was asked for at an earlier time."""
        if seconds <= 0:
            self.add(key)
            return
        due = self._clock.monotonic() + seconds
        if due >= self._due.get(key, float("inf")):
            return
        self._due[key] = due
        if len(self._heap) > 2 * len(self._due) + 64:  # mostly void entries: their keys were added earlier
            self._heap = [e for e in self._heap if self._due.get(e[2]) == e[0]]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (due, next(self._order), key))
        if self._heap[0][2] == key:
            self._timer_changed.set()

    def forget(self, key: K) -> None:
        """The next failure of `key` is its first one."""
        self._failures.pop(key, None)

    def retry(self, key: K, *, at_least: float = 0.0) -> float:
        """Counts a failure of `key` and adds it after its back-off, which is returned (seconds)."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        # 2**32 * base is far beyond any cap, and keeps the power from growing without bound.
        nominal = min(self._max_delay, self._base_delay * 2.0 ** min(failures, 32))
        delay = max(at_least, nominal * self._rng.uniform(1 - JITTER, 1))
        self._metrics.retried()
        self.add_after(key, delay)
        return delay

    # ---- looking ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Keys that wait for a worker."""
        return self._ready.qsize()

    def failures(self, key: K) -> int:
        """Failures in a row."""
        return self._failures.get(key, 0)

    def in_flight(self) -> frozenset[K]:
        """Keys that are being handled."""
        return frozenset(self._in_flight)

    def longest_running(self) -> float:
        """Seconds for which the slowest handler that runs now has been running; 0 if none runs."""
        return self._clock.monotonic() - min(self._in_flight.values(), default=self._clock.monotonic())

    # ---- working ------------------------------------------------------------------------------------

    async def run(self, workers: int, handler: Callable[[K], Awaitable[float | None]]) -> None:
        """Handles keys with `workers` tasks until it is cancelled.

        The handler returns after how many seconds it wants to see the key again, or None. If it raises, the
        key comes back after its back-off, at the earliest after the exception's `retry_after` if it has one.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._release(), name="workqueue-timer")
            for number in range(workers):
                tasks.create_task(self._work(handler), name=f"workqueue-{number}")

    async def _work(self, handler: Callable[[K], Awaitable[float | None]]) -> None:
        while True:
            key = await self._ready.get()
            started = self._clock.monotonic()
            self._in_flight[key] = started
            self._metrics.queued(started - self._wanted.pop(key))
            self._metrics.depth(len(self))
            again: float | None = None
            try:
                again = await handler(key)
            except Exception as error:
                delay = self.retry(key, at_least=getattr(error, "retry_after", None) or 0.0)
                log.exception(
                    "%s failed %d times in a row, next try in %.1f s", key, self.failures(key), delay
                )
            else:
                self.forget(key)
            finally:
                del self._in_flight[key]
                self._metrics.worked(self._clock.monotonic() - started)
                if key in self._wanted:  # added again meanwhile: that round decides anew when to come back
                    self._due.pop(key, None)
                    self._make_ready(key)
            if again is not None and key not in self._wanted:
                self.add_after(key, again)

    def _make_ready(self, key: K) -> None:
        self._ready.put_nowait(key)
        self._metrics.depth(len(self))

    async def _release(self) -> None:
        """Adds keys when their time has come."""
        while True:
            now = self._clock.monotonic()
            while self._heap and (
                self._heap[0][0] <= now or self._due.get(self._heap[0][2]) != self._heap[0][0]
            ):
                due, _, key = heapq.heappop(self._heap)
                if self._due.get(key) == due:
                    self.add(key)
            self._timer_changed.clear()
            if not self._heap:
                await self._timer_changed.wait()
                continue
            async with asyncio.TaskGroup() as race:
                sleep = race.create_task(self._clock.sleep(self._heap[0][0] - now))
                changed = race.create_task(self._timer_changed.wait())
                await asyncio.wait((sleep, changed), return_when=asyncio.FIRST_COMPLETED)
                sleep.cancel()
                changed.cancel()
