"""Moving a large file in parts, several at a time, with no copy of it in memory."""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import IO, TypeVar

T = TypeVar("T")

_STEP = 1 << 20
_LONGEST_PAUSE = 60.0
"""Seconds: more than this is not waited for in one go, whatever Retry-After says."""


class Stopped(Exception):
    """Another part has failed; this one need not go on."""


@contextlib.contextmanager
def mapped(file: IO[bytes], begin: int, end: int) -> Iterator[memoryview]:
    """The bytes [begin, end) of a file, not empty.

    Mapped part by part, so that a whole file never counts as memory of this process.
    """
    base = begin - begin % mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(file.fileno(), end - base, offset=base, access=mmap.ACCESS_READ) as mapping:
        whole = memoryview(mapping)
        view = whole[begin - base :]
        try:
            yield view
        finally:
            view.release()
            whole.release()


class Body:
    """Bytes as a file for an HTTP client, which may go back to the beginning to send them again. Nothing is copied."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def __len__(self) -> int:
        return len(self._view)

    def read(self, size: int | None = -1) -> memoryview:
        """At least `size` bytes where there are as many: urllib3 asks for 16 KiB a call, and would make 1000 of a part."""
        left = len(self._view) - self._at
        count = left if size is None or size < 0 else min(left, max(size, _STEP))
        self._at += count
        return self._view[self._at - count : self._at]

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._view))[whence]
        return self._at

    def tell(self) -> int:
        return self._at


class Pace:
    """How many requests may be under way: fewer, and after a pause, when the server says that it is too busy.

    Halved on each SlowDown, one more after as many successes as are allowed at a time: additive increase, multiplicative
    decrease (Chiu and Jain, 1989), as in TCP. Shared by all threads of a store.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.allowed = most
        self._running = 0
        self._successes = 0
        self._resume_at = 0.0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until one more may be under way."""
        with self._changed:
            while True:
                pause = self._resume_at - time.monotonic()
                if pause <= 0 and self._running < self.allowed:
                    break
                self._changed.wait(pause if pause > 0 else None)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def slowed(self, pause: float) -> None:
        """The server asked for fewer requests, and for none in the next `pause` seconds."""
        with self._changed:
            now = time.monotonic()
            if now >= self._resume_at:  # those under way together are told together, and count once
                self.allowed = max(1, self.allowed // 2)
            self._successes = 0
            self._resume_at = max(self._resume_at, now + min(pause, _LONGEST_PAUSE))
            self._changed.notify_all()

    def went_well(self) -> None:
        with self._changed:
            self._successes += 1
            if self._successes >= self.allowed < self._most:
                self.allowed, self._successes = self.allowed + 1, 0
                self._changed.notify_all()


def in_parallel(count: int, work: Callable[[int, threading.Event], T], *, workers: int, name: str) -> list[T]:
    """`work(0, stop) .. work(count - 1, stop)` by up to `workers` threads; the results in order.

    The first error is raised, after all threads have ended; `stop` tells the others of it.
    """
    stop = threading.Event()
    if count == 1:
        return [work(0, stop)]
    with ThreadPoolExecutor(min(workers, count), thread_name_prefix=name) as pool:
        futures = [pool.submit(work, number, stop) for number in range(count)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if any(f.done() and f.exception() for f in futures):
                stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    errors = [e for f in futures if not f.cancelled() and (e := f.exception()) is not None]
    for error in errors:
        if not isinstance(error, Stopped):
            raise error
    return [f.result() for f in futures]
