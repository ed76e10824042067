"""SIGTERM as news for a thread and a flag for the main thread; nothing else happens in the handler.

Python runs handlers in the main thread, between two of its instructions: a main thread that waits in a collective runs
none. The descriptor of `signal.set_wakeup_fd` is written to at once by the C handler, whatever the main thread does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

_installed: list[SigtermHandler] = []


class SigtermHandler:
    """`on_signal` runs in the main thread, inside the handler; `heard` in a thread, if there is to be one.

    A handler that was there before runs as well. Does nothing outside of the main thread.
    """

    def __init__(self, on_signal: Callable[[], None], heard: Callable[[], None] | None = None) -> None:
        self._on_signal, self._heard = on_signal, heard
        self._before: Any = None
        self._active = False
        self._pid = os.getpid()
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._fd_before = -1
        self._thread: threading.Thread | None = None
        self.received = False

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._active = True
        if self._heard is not None:
            self._ends = socket.socketpair()
            self._ends[1].setblocking(False)
            self._fd_before = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(
                target=self._listen, args=(self._ends[0], self._heard), name="sigterm", daemon=True
            )
            self._thread.start()
        _installed.append(self)
        self._before = signal.signal(signal.SIGTERM, self._handle)

    def restore(self) -> None:
        """As it was before. A handler that somebody put over this one stays."""
        if not self._active:
            return
        self._active = False
        _installed.remove(self)
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)
        if self._ends is not None:
            signal.set_wakeup_fd(self._fd_before)
            self._ends[1].close()
            if self._thread is not None:
                self._thread.join()
            self._ends[0].close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        try:
            if os.getpid() == self._pid:
                self._on_signal()
        finally:
            if callable(self._before):
                self._before(number, frame)

    def _listen(self, end: socket.socket, heard: Callable[[], None]) -> None:
        """Until the other end is closed."""
        while numbers := end.recv(64):
            if self._fd_before >= 0:
                with suppress(OSError):
                    os.write(self._fd_before, numbers)
            if signal.SIGTERM in numbers:
                self.received = True
                heard()

    def _forget_in_child(self) -> None:
        """A forked process (a loader's worker) shares the descriptor: what happens to it is no news to its parent."""
        if self._ends is not None:
            signal.set_wakeup_fd(self._fd_before)
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)


def _after_fork() -> None:
    with suppress(
        ValueError
    ):  # not forked from the main thread: the new process' only thread is not "main" to Python
        while _installed:
            _installed.pop()._forget_in_child()


os.register_at_fork(after_in_child=_after_fork)
