"""The worker's side of an uploader: over the socket of the pod's one, or with one of its own in a thread."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import CheckpointError
from trainyard.checkpoint.messages import Outcome, Staged, from_line, to_line
from trainyard.checkpoint.stores import Store
from trainyard.checkpoint.uploads import UploadService
from trainyard_api.contract import Env

log = logging.getLogger("trainyard.checkpoint")

_LINGER_SECONDS = 1.0
_RECONNECT_SECONDS = 30.0
"""How long an uploader may be away (the agent restarts it) before a save is given up."""


class Uploads(Protocol):
    """One shard in flight at a time."""

    def submit(self, staged: Staged) -> None:
        """Hand a staged file over; its outcome comes later. Never raises."""
        ...

    def abandon(self, staged: Staged, reason: str) -> None:
        """Record as dropped a shard that could not be staged."""
        ...

    @property
    def busy(self) -> bool: ...

    def take(self, seconds: float = 0.0) -> Outcome | None:
        """The outcome of the shard in flight, once, waiting up to `seconds`; None if there is none yet."""
        ...

    def flush(self, seconds: float) -> None:
        """Give older saves of this pod (workers that were killed) up to `seconds` to be committed."""
        ...

    def close(self) -> None: ...


class _OneInFlight:
    """What both kinds share."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._in_flight: Staged | None = None
        self._outcome: Outcome | None = None

    @property
    def busy(self) -> bool:
        with self._condition:
            return self._in_flight is not None

    def take(self, seconds: float = 0.0) -> Outcome | None:
        with self._condition:
            self._condition.wait_for(
                lambda: self._outcome is not None or self._in_flight is None, timeout=seconds
            )
            outcome, self._outcome = self._outcome, None
            return outcome

    def abandon(self, staged: Staged, reason: str) -> None:
        self._begin(staged)
        self._give_up(reason)

    def _begin(self, staged: Staged) -> None:
        with self._condition:
            self._in_flight, self._outcome = staged, None

    def _heard(self, outcome: Outcome) -> None:
        with self._condition:
            mine = self._in_flight
            if mine is None or (mine.attempt, mine.step, mine.rank) != (
                outcome.attempt,
                outcome.step,
                outcome.rank,
            ):
                return
            self._in_flight, self._outcome = None, outcome
            self._condition.notify_all()

    def _give_up(self, reason: str) -> None:
        with self._condition:
            mine = self._in_flight
        if mine is not None:
            self._heard(
                Outcome(op="dropped", attempt=mine.attempt, step=mine.step, rank=mine.rank, reason=reason)
            )


class LocalUploads(_OneInFlight):
    """With an uploader of its own: what is in flight ends with the process."""

    def __init__(self, store: Store, run: str, *, staging: Path, keep: int) -> None:
        super().__init__()
        self._service = UploadService(store, run, staging=staging, keep=keep)

    def submit(self, staged: Staged) -> None:
        self._begin(staged)
        self._service.submit(staged, self._heard)

    def flush(self, seconds: float) -> None:
        """Nothing: an uploader that is born with this process has no older saves."""

    def close(self) -> None:
        """Nobody goes on when this process ends: what is in flight gets a moment to be committed, and what it replaces to
        be deleted."""
        if self.busy:
            self.take(_LINGER_SECONDS)
        self._service.settle(_LINGER_SECONDS)


class SocketUploads(_OneInFlight):
    """Over the socket of the pod's uploader. A lost connection is made again and the shard submitted again."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._sending = threading.Lock()
        self._closed = False
        self._flushed = threading.Event()
        self._socket = self._connect()
        threading.Thread(target=self._listen, name="uploader-client", daemon=True).start()

    def submit(self, staged: Staged) -> None:
        self._begin(staged)
        self._send(staged.line())

    def flush(self, seconds: float) -> None:
        self._flushed.clear()
        self._send(to_line({"op": "flush", "seconds": seconds}))
        self._flushed.wait(seconds + 1.0)

    def close(self) -> None:
        self._closed = True
        with self._sending, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> socket.socket:
        """Raises CheckpointError when nobody listens for 30 s."""
        deadline = time.monotonic() + _RECONNECT_SECONDS
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._path)
                return connection
            except OSError as error:
                connection.close()
                if time.monotonic() > deadline or self._closed:
                    raise CheckpointError(
                        f"no uploader answers at {self._path} for {_RECONNECT_SECONDS:g} s ({error.strerror}); the "
                        "agent of this pod should have started one"
                    ) from error
            time.sleep(0.05)

    def _send(self, line: bytes) -> None:
        # A failure shows in _listen too, which reconnects and submits again.
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(line)

    def _listen(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
                for line in lines:
                    self._hear(line)
            with contextlib.suppress(OSError):
                self._socket.close()
            if self._closed:
                return
            try:
                connection = self._connect()
            except CheckpointError as error:
                self._give_up(str(error))
                return
            with self._sending:
                self._socket = connection
            with self._condition:
                mine = self._in_flight
            if mine is not None:
                self._send(mine.line())

    def _hear(self, line: bytes) -> None:
        try:
            message = from_line(line)
            if message["op"] == "flushed":
                self._flushed.set()
            elif message["op"] == "error":
                self._give_up(f"the uploader says: {message.get('reason')}")
            else:
                self._heard(Outcome.from_message(message))
        except ValueError as error:
            log.warning("the uploader said something odd: %s", error)


def open_uploads(
    config: CheckpointConfig, store: Store, staging: Path, env: Mapping[str, str] = os.environ
) -> Uploads:
    """The pod's uploader if there is one, else one in this process."""
    path = env.get(Env.UPLOADER_SOCKET)
    if path:
        return SocketUploads(path)
    return LocalUploads(store, config.run_id, staging=staging, keep=config.keep)
