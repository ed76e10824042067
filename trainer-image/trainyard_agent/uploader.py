"""Keeps the checkpoint uploader alive and listens to what it commits.

The program is `python -m trainyard.checkpoint.uploader --socket S --staging D`. On SIGTERM it finishes what is
staged and ends. It is no part of an attempt: an upload outlives the worker that staged it.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainyard_agent.child import spawn
from trainyard_agent.lines import Closed, LineReader
from trainyard_agent.rootcause import signal_name

RETRY_SECONDS = (0.2, 1.0, 5.0, 30.0)
STEADY_SECONDS = 60.0
"""After so long a life, the next death counts as the first."""
SUBSCRIBE_SECONDS = 0.1
"""Pause between two tries to subscribe."""


class Uploader:
    def __init__(
        self,
        env: dict[str, str],
        socket_path: Path,
        staging: Path,
        drain_seconds: float,
        selector: selectors.BaseSelector,
        *,
        heard: Callable[[dict[str, Any]], None],
        warn: Callable[[str], None],
    ) -> None:
        self._env = env
        self._socket_path = socket_path
        self._arguments = [
            "--socket",
            str(socket_path),
            "--staging",
            str(staging),
            "--drain",
            f"{drain_seconds:g}",
        ]
        self._selector = selector
        self._heard, self._warn = heard, warn
        self._events: socket.socket | None = None
        self._reader: LineReader | None = None
        self._started = 0.0
        self._deaths = 0
        self._next = 0.0
        self._ending = False
        self.pid: int | None = None

    def tick(self, now: float) -> float:
        """Starts it and subscribes when it is time to; the monotonic time of the next call that is needed."""
        if self._ending or now < self._next:
            return float("inf") if self._ending else self._next
        if self.pid is None:
            self._start(now)
        elif self._events is None:
            self._subscribe(now)
        return float("inf") if self._events else self._next

    def exited(self, pid: int, status: int) -> bool:
        """The child `pid` was reaped; whether that was the uploader."""
        if pid != self.pid:
            return False
        self.pid = None
        self._read_all()
        self._unsubscribe()
        if not self._ending:
            self._failed(f"ended with {signal_name(-status) if status < 0 else f'code {status}'}")
        return True

    def finish(self) -> None:
        """Asks it to finish what is staged and to end. `pid` is None when it has."""
        self._ending = True
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        self._ending = True
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _failed(self, why: str) -> None:
        now = time.monotonic()
        self._deaths = 1 if now - self._started > STEADY_SECONDS else self._deaths + 1
        pause = RETRY_SECONDS[min(self._deaths, len(RETRY_SECONDS)) - 1]
        self._next = now + pause
        self._warn(f"checkpoint uploader {why}; starting it again in {pause:g} s")

    def _start(self, now: float) -> None:
        self._started = now
        try:
            self.pid = spawn(["-m", "trainyard.checkpoint.uploader", *self._arguments], self._env)
            self._next = now + SUBSCRIBE_SECONDS
        except OSError as error:
            self._failed(f"could not be started: {error}")

    def _subscribe(self, now: float) -> None:
        self._next = now + SUBSCRIBE_SECONDS
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(str(self._socket_path))
            connection.sendall(b'{"op":"subscribe"}\n')
        except OSError:  # not there yet
            connection.close()
            return
        self._events = connection
        self._reader = LineReader(connection.fileno())
        self._selector.register(connection, selectors.EVENT_READ, self._readable)

    def _unsubscribe(self) -> None:
        if self._events is not None:
            self._selector.unregister(self._events)
            self._events.close()
        self._events = self._reader = None

    def _read_all(self) -> None:
        """What it said before it ended."""
        with suppress(Closed):
            while self._reader is not None and (messages := self._reader.read()):
                for message in messages:
                    self._heard(message)

    def _readable(self) -> None:
        try:
            messages = self._reader.read() if self._reader else []
        except Closed:
            self._unsubscribe()
            self._next = time.monotonic() + SUBSCRIBE_SECONDS
            return
        for message in messages:
            self._heard(message)
