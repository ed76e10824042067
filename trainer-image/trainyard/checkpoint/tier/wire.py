"""The line between nodes: TCP; a proof of the token first, then requests of one JSON line, some followed by bytes.

The token itself never travels here: the server sends a nonce, the client answers with its HMAC. What is sent is not
encrypted, as the gradients between the same nodes are not; what is received is believed only by its digests.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

GREET_SECONDS = 5.0
IDLE_SECONDS = 30.0
"""Longest wait for the next bytes of a request that has begun."""
CONNECT_SECONDS = 3.0
MOST_LINE = 2 << 20
"""Bytes. The longest is a descriptor: 9000 digests."""
_HELLO = b"trainyard tier 1\n"
_NONCE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the uploader of a node answers, and to whom."""

    host: str
    port: int
    token: str
    """Hexadecimal. Not for logs, arguments or environments."""

    def __repr__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def place(self) -> tuple[str, int]:
        return self.host, self.port


class WireError(OSError):
    """The other side hung up, or does not keep to the protocol."""


class Declined(Exception):
    """The other side says no, and why; the connection is as good as before."""


class Line:
    """One connection. Not for several threads at once. All methods raise OSError, of which WireError is one."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.settimeout(IDLE_SECONDS)
        self._reader = connection.makefile("rb")

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def receive(self, *, idle: bool = False) -> dict[str, Any] | None:
        """None: it hung up, or (`idle`) was silent for IDLE_SECONDS between two requests."""
        try:
            text = self._reader.readline(MOST_LINE)
        except TimeoutError:
            if idle:
                return None
            raise
        if not text:
            return None
        if not text.endswith(b"\n"):
            raise WireError("a line without an end")
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WireError("a line that is not JSON") from error
        if not isinstance(message, dict):
            raise WireError("a line that is no object")
        return message

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer, which says ok. Raises Declined."""
        self.send(message)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        found = self.receive()
        if found is None:
            raise WireError("hung up")
        if found.get("ok") is not True:
            raise Declined(str(found.get("reason"))[:300])
        return found

    def read_into(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._reader.readinto(buffer[done:])
            if not count:
                raise WireError("hung up")
            done += count

    def send_file(self, file: Any, begin: int, size: int) -> None:
        """`file` is open for reading, binary."""
        if self._socket.sendfile(file, begin, size) != size:
            raise WireError("the file is cut off")


def connect(address: Address) -> Line:
    """Raises OSError."""
    connection = socket.create_connection(address.place, timeout=CONNECT_SECONDS)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = _exactly(connection, len(_HELLO) + _NONCE)
        if not nonce.startswith(_HELLO):
            raise WireError("it speaks another language")
        connection.sendall(_proof(address.token, nonce))
        if _exactly(connection, 1) != b"+":
            raise WireError("it refuses the token")
        return Line(connection)
    except BaseException:
        connection.close()
        raise


def welcome(connection: socket.socket, token: str) -> Line:
    """The server's side. Raises WireError for a client that does not know the token, OSError."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    nonce = _HELLO + os.urandom(_NONCE)
    connection.settimeout(GREET_SECONDS)
    connection.sendall(nonce)
    if not hmac.compare_digest(_exactly(connection, 32), _proof(token, nonce)):
        connection.sendall(b"-")
        raise WireError("a client without the token")
    connection.sendall(b"+")
    return Line(connection)


def _proof(token: str, nonce: bytes) -> bytes:
    return hmac.digest(token.encode(), nonce, "sha256")


def _exactly(connection: socket.socket, size: int) -> bytes:
    """Within GREET_SECONDS in all."""
    deadline, found = time.monotonic() + GREET_SECONDS, b""
    while len(found) < size:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        more = connection.recv(size - len(found))
        if not more:
            raise WireError("hung up")
        found += more
    return found
