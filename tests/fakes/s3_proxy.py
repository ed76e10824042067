"""An HTTP proxy in front of a real S3 server that makes the faults of a bad day. Requests pass unchanged, signatures hold.

    with S3Proxy(server.access) as proxy:                      # server: devcluster.s3.S3Server
        store = S3Store("s3://training/x", "run-1", endpoint=proxy.url)
        with proxy.fault("error", method="PUT", status=503, code="SlowDown", retry_after="2", times=3):
            store.put("key", b"...")
        assert proxy.count("PUT") == 4
        assert proxy.fired["error"] == 3                       # the fault did happen

A fault meets requests whose method and `path` (a regular expression, searched for in the path with its query) fit, the first
`skip` of them excepted, and `times` of them (None: all). Of several that fit the one added last is taken. As a context
manager it ends with the block; else with `proxy.clear()`. Byte offsets `at` are of the request's or answer's body.

    error          answer `status` and `code`, with `retry_after` as the header Retry-After; the server hears nothing
    stall          take `at` bytes of the request's body, then nothing, for `seconds`: a time-out in the middle of a PUT
    reset_upload   take `at` bytes of the request's body, then reset the connection; the server sees a broken upload
    lose_answer    the server does it, and the connection is reset instead of an answer
    cut_answer     pass `at` bytes of the answer's body, then close the connection
    flip           flip the bit `bit` of byte `at` of the answer's body (`at` beyond its end: of the last byte)
    stale_list     answer a listing as it was when the fault was added (empty, if it had not been asked for by then)
    unconditional  a server without conditional writes: If-None-Match is ignored
    at_byte        call `then()` once `at` bytes of the request's body have been passed on, and go on

Threads serve it, one a connection; `then` is called in one of them.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from devcluster.s3 import S3Access

_CHUNK = 1 << 16
_SECONDS = 60.0
"""Nobody waits longer for the server, or for a client."""
_KINDS = {
    "error", "stall", "reset_upload", "lose_answer", "cut_answer", "flip", "stale_list", "unconditional", "at_byte",
}  # fmt: skip
_HOP = {"connection", "keep-alive", "expect", "transfer-encoding"}


@dataclass(slots=True, kw_only=True)
class Fault:
    """See the module's text."""

    kind: str
    method: str = ""
    path: str = ""
    skip: int = 0
    times: int | None = None
    status: int = 503
    code: str = "SlowDown"
    retry_after: str = ""
    at: int = 0
    bit: int = 0
    seconds: float = _SECONDS
    then: Callable[[], None] = lambda: None
    listings: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seen:
    """A request, as it came."""

    at: float
    """time.monotonic()."""
    method: str
    path: str
    """With its query."""


class S3Proxy:
    """Starts with the block and ends with it, and with it all connections."""

    def __init__(self, access: S3Access) -> None:
        self.access = access
        self.seen: list[Seen] = []
        self.fired: Counter[str] = Counter()
        """By kind: how often a fault happened."""
        self.bytes_up = 0
        """Of request bodies, passed on so far."""
        self._faults: list[Fault] = []
        self._listings: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="s3-proxy", daemon=True
        )

    @property
    def url(self) -> str:
        """What a client uses as its endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> S3Proxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join(_SECONDS)
        with self._lock:
            open_ones = list(self._connections)
        for connection in open_ones:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def fault(self, kind: str, **arguments: Any) -> contextlib.AbstractContextManager[Fault]:
        """Add one at once; as a context manager, take it away at the end of the block."""
        if kind not in _KINDS:
            raise ValueError(f"{kind!r} is none of {sorted(_KINDS)}")
        added = Fault(kind=kind, **arguments)
        with self._lock:
            added.listings = dict(self._listings)
            self._faults.append(added)
        return self._ending(added)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def count(self, method: str = "", path: str = "") -> int:
        """Requests so far."""
        with self._lock:
            return sum(1 for s in self.seen if method in ("", s.method) and re.search(path, s.path))

    @contextlib.contextmanager
    def _ending(self, added: Fault) -> Iterator[Fault]:
        try:
            yield added
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._faults.remove(added)

    # ---- for the handler

    def meet(self, method: str, path: str, conditional: bool) -> Fault | None:
        """Note a request, and choose what happens to it."""
        with self._lock:
            self.seen.append(Seen(time.monotonic(), method, path))
            for fault in reversed(self._faults):
                if fault.method not in ("", method) or not re.search(fault.path, path) or fault.times == 0:
                    continue
                if fault.kind == "unconditional" and not conditional:
                    continue
                if fault.kind == "stale_list" and not _is_listing(method, path):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                self.fired[fault.kind] += 1
                return fault
        return None

    def passed(self, count: int) -> None:
        with self._lock:
            self.bytes_up += count

    def remember(self, path: str, listing: bytes) -> None:
        with self._lock:
            self._listings[path] = listing

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)

    def wait(self, seconds: float) -> None:
        self._closing.wait(seconds)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], proxy: S3Proxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: broken connections are what this is for."""


class _Reset(Exception):
    """End the connection with a reset."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = _SECONDS
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.proxy.opened(self.connection)

    def finish(self) -> None:
        self.server.proxy.closed(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def handle_expect_100(self) -> bool:
        return True  # the handler decides whether the body is wanted at all

    def _serve(self) -> None:
        proxy = self.server.proxy
        fault = proxy.meet(self.command, self.path, "if-none-match" in self.headers)
        kind = fault.kind if fault else ""
        expects = self.headers.get("expect", "").lower() == "100-continue"
        try:
            if fault is not None and kind == "error":
                if not expects:
                    self._drain()
                self._refuse(fault)
                return
            if fault is not None and kind == "stale_list":
                self._answer(
                    200,
                    [("Content-Type", "application/xml")],
                    fault.listings.get(self.path, _empty(self.path)),
                )
                return
            if expects:
                self.send_response_only(100)
                self.end_headers()
            if fault is not None and kind == "stall":
                self.rfile.read(min(fault.at, self._length()))
                proxy.wait(fault.seconds)
                raise _Reset
            self._forward(fault)
        except _Reset:
            # SO_LINGER with zero seconds: close(2) sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        except (OSError, http.client.HTTPException):  # one of the two sides is gone
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _length(self) -> int:
        return int(self.headers.get("content-length") or 0)

    def _drain(self) -> None:
        left = self._length()
        while left > 0 and (data := self.rfile.read(min(_CHUNK, left))):
            left -= len(data)

    def _forward(self, fault: Fault | None) -> None:
        proxy, kind = self.server.proxy, fault.kind if fault else ""
        if fault is not None and kind == "unconditional":
            status, headers, body = self._overwrite()
            self._answer(status, headers, body)
            return
        upstream = http.client.HTTPConnection(proxy.access.host, proxy.access.port, timeout=_SECONDS)
        try:
            self._begin(upstream)
            done, length, called = 0, self._length(), False
            while True:
                stop = length
                if fault is not None and (kind == "reset_upload" or (kind == "at_byte" and not called)):
                    stop = min(fault.at, length)
                while done < stop:
                    data = self.rfile.read(min(_CHUNK, stop - done))
                    if not data:
                        raise _Reset
                    upstream.send(data)
                    done += len(data)
                    proxy.passed(len(data))
                if fault is not None and kind == "reset_upload":
                    raise _Reset
                if fault is not None and kind == "at_byte" and not called:
                    called = True
                    fault.then()
                if done >= length:
                    break
            answer = upstream.getresponse()
            if kind == "lose_answer":
                answer.read()
                raise _Reset
            self._relay(answer, fault)
        finally:
            upstream.close()

    def _begin(self, upstream: http.client.HTTPConnection) -> None:
        # The headers as they came, the Host too: they are signed.
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP:
                upstream.putheader(name, value)
        upstream.endheaders()

    def _overwrite(self) -> tuple[int, list[tuple[str, str]], bytes]:
        """As a server that ignores If-None-Match: the header is signed and stays, so what is in the way goes first."""
        proxy = self.server.proxy
        body = self.rfile.read(self._length())
        while True:
            proxy.access.request("DELETE", self.path.split("?")[0])
            upstream = http.client.HTTPConnection(proxy.access.host, proxy.access.port, timeout=_SECONDS)
            try:
                self._begin(upstream)
                upstream.send(body)
                answer = upstream.getresponse()
                content = answer.read()
                if answer.status != 412:
                    return answer.status, answer.getheaders(), content
            finally:
                upstream.close()

    def _relay(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        kind, at = (fault.kind, fault.at) if fault else ("", 0)
        length = answer.getheader("Content-Length")
        listing = _is_listing(self.command, self.path)
        if self.command == "HEAD" or answer.status in (204, 304):
            self._head(answer.status, answer.getheaders(), length)
            return
        if length is None or listing or kind == "flip":
            body = answer.read()
            if listing and answer.status == 200:
                self.server.proxy.remember(self.path, body)
            if fault is not None and kind == "flip" and body:
                at = min(at, len(body) - 1)
                body = body[:at] + bytes([body[at] ^ (1 << fault.bit)]) + body[at + 1 :]
            if kind != "cut_answer":
                self._answer(answer.status, answer.getheaders(), body)
                return
            self._head(answer.status, answer.getheaders(), str(len(body)))
            self.wfile.write(body[:at])
            self.close_connection = True
            return
        self._head(answer.status, answer.getheaders(), length)
        left = int(length) if kind != "cut_answer" else min(at, int(length))
        while left > 0 and (data := answer.read(min(_CHUNK, left))):
            self.wfile.write(data)
            left -= len(data)
        if kind == "cut_answer":
            self.close_connection = True

    def _refuse(self, fault: Fault) -> None:
        headers = [("Content-Type", "application/xml")]
        if fault.retry_after:
            headers.append(("Retry-After", fault.retry_after))
        text = f"<Error><Code>{fault.code}</Code><Message>made by the proxy</Message></Error>"
        self.close_connection = True
        self._answer(fault.status, headers, text.encode())

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._head(status, headers, str(len(body)))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: list[tuple[str, str]], length: str | None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP and name.lower() != "content-length":
                self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", length)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


def _is_listing(method: str, path: str) -> bool:
    return method == "GET" and "list-type=2" in path


def _empty(path: str) -> bytes:
    prefix = re.search(r"[?&]prefix=([^&]*)", path)
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Prefix>{prefix[1] if prefix else ''}</Prefix><KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys>"
        "<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated></ListBucketResult>"
    ).encode()
