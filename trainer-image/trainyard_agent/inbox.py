"""The unix socket on which the workers say how far they are (`trainyard.elastic.client` is the other side)."""

from __future__ import annotations

import math
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainyard_agent.lines import Closed, LineReader
from trainyard_agent.log import one_line
from trainyard_api.protocol import Progress, Resumed

MAX_CONNECTIONS = 256


def listen(path: Path) -> socket.socket:
    """A listening stream socket at `path`, in place of what is there. Raises OSError (a path over 107 bytes, too)."""
    with suppress(FileNotFoundError):
        path.unlink()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    path.chmod(0o600)
    server.listen(64)
    server.setblocking(False)
    return server


def parse_progress(message: dict[str, Any]) -> tuple[int, Progress]:
    """(attempt, progress). Raises ValueError, KeyError or TypeError when it is not a progress message."""
    total = message.get("total_steps")
    return int(message["attempt"]), Progress(
        step=int(message["step"]),
        total_steps=None if total is None else int(total),
        epoch=int(message.get("epoch") or 0),
        loss=_finite(message.get("loss")),
        samples_per_second=_finite(message.get("samples_per_second")),
        time=float(message.get("time") or time.time()),
    )


def parse_resumed(message: dict[str, Any]) -> Resumed:
    """Raises ValueError, KeyError or TypeError when it is not a message of where the workers start from."""
    return Resumed(
        attempt=int(message["attempt"]),
        step=int(message["step"]),
        uri=one_line(message.get("uri") or ""),
        fell_back=one_line(message.get("fell_back") or ""),
    )


def _finite(value: object) -> float | None:
    """A number that JSON can carry, or None."""
    number = float(value) if isinstance(value, int | float) else None
    return number if number is not None and math.isfinite(number) else None


class Inbox:
    """Accepts connections and hands each message to `handle`; a peer that talks nonsense is cut off."""

    def __init__(
        self, path: Path, selector: selectors.BaseSelector, handle: Callable[[dict[str, Any]], None]
    ) -> None:
        self._path = path
        self._selector = selector
        self._handle = handle
        self._server = listen(path)
        self._connections: dict[int, socket.socket] = {}
        selector.register(self._server, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        for fd in list(self._connections):
            self._drop(fd)
        self._selector.unregister(self._server)
        self._server.close()
        with suppress(FileNotFoundError):
            self._path.unlink()

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        reader = LineReader(connection.fileno())
        self._connections[connection.fileno()] = connection
        self._selector.register(
            connection, selectors.EVENT_READ, lambda: self._read(reader, connection.fileno())
        )

    def _read(self, reader: LineReader, fd: int) -> None:
        try:
            for message in reader.read():
                self._handle(message)
        except (Closed, ValueError, KeyError, TypeError, OverflowError):
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        connection = self._connections.pop(fd, None)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()
