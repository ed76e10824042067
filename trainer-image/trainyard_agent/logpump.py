"""Copies the workers' output to the pod's log, whole lines only, each with its rank in front.

A thread of its own: when the log's reader is slow, the agent's main loop is not.
"""

from __future__ import annotations

import os
import selectors
import threading
from collections import deque
from contextlib import suppress

LONGEST_LINE = 64 * 1024
"""Bytes; a longer line is cut into several."""


class _Stream:
    """One worker's stdout or stderr."""

    def __init__(self, prefix: bytes, target: int) -> None:
        self._prefix = prefix
        self._target = target
        self._rest = b""

    def feed(self, part: bytes) -> None:
        *lines, rest = (self._rest + part).split(b"\n")
        while len(rest) > LONGEST_LINE:
            lines.append(rest[:LONGEST_LINE])
            rest = rest[LONGEST_LINE:]
        self._rest = rest
        if lines:
            write_all(self._target, b"".join(self._prefix + line + b"\n" for line in lines))

    def end(self) -> None:
        if self._rest:
            self.feed(b"\n")


def write_all(fd: int, data: bytes) -> None:
    """Writes everything; gives up silently when nobody reads any more."""
    view = memoryview(data)
    with suppress(OSError):
        while view:
            view = view[os.write(fd, view) :]


class LogPump:
    """A thread that copies until it is stopped."""

    def __init__(self) -> None:
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        self._new: deque[tuple[int, bytes, int]] = deque()
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_r, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="log pump", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, fd: int, rank: int, target: int) -> None:
        """Takes over `fd`, copies it to `target` until its end, and closes it. Called from any thread."""
        os.set_blocking(fd, False)
        self._new.append((fd, f"[rank {rank}] ".encode(), target))
        self._wake()

    def stop(self, bound: float) -> None:
        """Copies what is there to read now, then ends; waits at most `bound` seconds for that."""
        self._stopping = True
        self._wake()
        self._thread.join(bound)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # full: it will wake anyway
            os.write(self._wake_w, b"x")

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select():
                self._copy(key.fd, key.data)
        for key in list(self._selector.get_map().values()):
            while key.data is not None and self._copy(key.fd, key.data):
                pass

    def _copy(self, fd: int, stream: _Stream | None) -> bool:
        """Copies one piece; whether there was one."""
        if stream is None:
            os.read(fd, 4096)
            while self._new:
                new, prefix, target = self._new.popleft()
                self._selector.register(new, selectors.EVENT_READ, _Stream(prefix, target))
            return False
        try:
            part = os.read(fd, 65536)
        except BlockingIOError:
            return False
        if part:
            stream.feed(part)
            return True
        stream.end()
        self._selector.unregister(fd)
        os.close(fd)
        return False
