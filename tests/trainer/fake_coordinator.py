"""A coordinator for tests of the agent: real HTTP, real long polls, directives set by the test."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trainyard_api.protocol import BEAT_SECONDS, Action, Beat, Directive


class FakeCoordinator:
    """Remembers every beat by pod UID and answers with the directive that the test has set for that pod."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._directives: dict[str, Directive] = {}
        self.beats: dict[str, list[tuple[float, Beat]]] = {}
        self.status = 200
        """Other than 200: every beat is answered so."""
        self.token = "secret-token"
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self._sockets: set[Any] = set()
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def up(self) -> None:
        """Begins to serve, at the same port as before."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                outer._sockets.add(self.request)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, answer = outer._answer(self.path, self.headers["Authorization"], json.loads(body))
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A connection that `down` cut."""

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Stops listening and cuts every connection."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        with self._changed:
            self._changed.notify_all()
        for connection in list(self._sockets):
            with suppress(OSError):
                connection.shutdown(2)
        self._sockets.clear()

    def encrypt(self, context: ssl.SSLContext) -> None:
        """Serves HTTPS from now on."""
        assert self._server is not None
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def direct(self, pod_uid: str, directive: Directive) -> None:
        with self._changed:
            self._directives[pod_uid] = directive
            self._changed.notify_all()

    def _answer(self, path: str, authorization: str, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert path.startswith("/v1/runs/") and path.endswith("/beat"), path
        if authorization != f"Bearer {self.token}":
            return 401, {"error": "token refused"}
        if self.status != 200:
            return self.status, {"error": "as the test wishes"}
        beat = Beat.from_json(data)
        deadline = time.monotonic() + min(beat.wait, BEAT_SECONDS)
        with self._changed:
            self.beats.setdefault(beat.pod_uid, []).append((time.time(), beat))
            self._changed.notify_all()
            while True:
                hold = Directive(action=Action.HOLD, attempt=0, reason="nothing to do")
                directive = self._directives.get(beat.pod_uid, hold)
                left = deadline - time.monotonic()
                if directive.revision != beat.seen or left <= 0 or self._server is None:
                    return 200, directive.to_json()
                self._changed.wait(left)

    def wait_for(
        self, pod_uid: str, wanted: Callable[[Beat], bool], *, bound: float = 30.0, since: float = 0.0
    ) -> tuple[float, Beat]:
        """The first beat of the pod, received after `since` (Unix seconds), that is `wanted`, and when it was received.

        Raises AssertionError with the newest beat after `bound` seconds.
        """
        deadline = time.monotonic() + bound
        with self._changed:
            while True:
                beats = self.beats.get(pod_uid, [])
                found = next(((t, b) for t, b in beats if t >= since and wanted(b)), None)
                if found:
                    return found
                left = deadline - time.monotonic()
                assert left > 0, (
                    f"not seen within {bound:g} s; the newest of {len(beats)} beats: {beats[-1:]}"
                )
                self._changed.wait(left)
