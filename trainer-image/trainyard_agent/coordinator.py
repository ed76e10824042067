"""Beats and directives over HTTP: two threads, two persistent connections, one mailbox.

The poller's request is held back by the coordinator (long poll), so a change that cannot wait goes over the
reporter's connection. Both send the newest snapshot, and take it and send it under one lock, so that no
older snapshot is sent after a newer one.
"""

from __future__ import annotations

import http.client
import json
import random
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from trainyard_agent.log import one_line
from trainyard_api.protocol import BEAT_SECONDS, MAX_BODY, Beat, Directive

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = BEAT_SECONDS + 2.0
"""Longest wait for an answer, that of a long poll included. A missing beat is noticed after 10 s."""
RETRY_SECONDS = (0.2, 2.0)
"""Bounds of the random pause after a failed exchange."""


@dataclass(frozen=True, slots=True)
class Answer:
    directive: Directive


@dataclass(frozen=True, slots=True)
class Refusal:
    """An HTTP status other than 200 (the number), or no answer at all (0)."""

    status: int
    text: str


class Mailbox:
    """The newest beat, from the main thread to the two HTTP threads."""

    def __init__(self, beat: Beat) -> None:
        self._changed = threading.Condition()
        self._beat = beat
        self._version = 1
        self._urgent = 1
        self._delivered = 0
        self._closed = False

    def publish(self, beat: Beat, *, urgent: bool) -> None:
        with self._changed:
            self._beat = beat
            self._version += 1
            if urgent:
                self._urgent = self._version
            self._changed.notify_all()

    def close(self) -> None:
        """The threads end after what they are doing now."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def latest(self) -> tuple[int, Beat]:
        with self._changed:
            return self._version, self._beat

    def delivered(self, version: int) -> None:
        with self._changed:
            self._delivered = max(self._delivered, version)
            self._changed.notify_all()

    def wait_undelivered(self) -> None:
        """Until something urgent was not delivered yet, or `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._urgent > self._delivered)

    def wait_seen(self, revision: str, bound: float) -> None:
        """Until the main thread has obeyed `revision`, at most `bound` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._beat.seen == revision, bound)

    def wait_delivered(self, bound: float) -> bool:
        """Until all that was urgent was delivered, at most `bound` seconds; whether it was."""
        with self._changed:
            return self._changed.wait_for(lambda: self._delivered >= self._urgent, bound)

    def pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)


class Link:
    """One persistent connection to the coordinator. Used by one thread."""

    def __init__(self, url: str, ca: str, token_file: Path, run_uid: str) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port
        self._path = f"{parts.path}/v1/runs/{run_uid}/beat"
        self._token_file = token_file
        self._tls = ssl.create_default_context(cadata=ca or None) if parts.scheme == "https" else None
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> http.client.HTTPConnection:
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_SECONDS, context=self._tls)
            if self._tls
            else http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_SECONDS)
        )
        connection.connect()
        connection.sock.settimeout(ANSWER_SECONDS)
        self._connection = connection
        return connection

    def exchange(self, order: threading.Lock, beat: Callable[[], Beat]) -> Answer | Refusal:
        """Sends what `beat` gives, called and sent under `order`; the coordinator's answer.

        A kept connection that the other side has closed meanwhile is replaced once, without a word.
        """
        for fresh in (self._connection is None, True):
            try:
                return self._once(order, beat)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.close()
                stale = not fresh and isinstance(error, ConnectionError | http.client.RemoteDisconnected)
                if not stale:
                    return Refusal(0, one_line(f"{type(error).__name__}: {error}", 200))
        raise AssertionError("the second try is always the last")

    def _once(self, order: threading.Lock, beat: Callable[[], Beat]) -> Answer | Refusal:
        connection = self._connection or self._connect()
        headers = {
            "Authorization": f"Bearer {self._token_file.read_text().strip()}",
            "Content-Type": "application/json",
        }
        with order:
            connection.request("POST", self._path, json.dumps(beat().to_json()).encode(), headers)
        response = connection.getresponse()
        body = response.read(MAX_BODY + 1)
        if len(body) > MAX_BODY:
            raise ValueError(f"an answer of more than {MAX_BODY} bytes")
        if response.will_close or not response.isclosed():
            self.close()
        if response.status != 200:
            return Refusal(response.status, one_line(body.decode(errors="replace"), 200))
        return Answer(Directive.from_json(json.loads(body)))


class Coordinator:
    """The two threads. `deliver` is called from them with each answer; it must only hand it over."""

    def __init__(
        self, links: tuple[Link, Link], mailbox: Mailbox, deliver: Callable[[Answer | Refusal], None]
    ) -> None:
        self._mailbox = mailbox
        self._deliver = deliver
        self._order = threading.Lock()
        self._threads = [
            threading.Thread(target=self._poll, args=(links[0],), name="poller", daemon=True),
            threading.Thread(target=self._report, args=(links[1],), name="reporter", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, bound: float) -> None:
        """Tells the threads to end and waits at most `bound` seconds; they are daemons, so none is waited for longer."""
        self._mailbox.close()
        deadline = time.monotonic() + bound
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def _exchange(self, link: Link, wait: float) -> Answer | Refusal:
        taken: list[int] = []

        def newest() -> Beat:
            version, beat = self._mailbox.latest()
            taken[:] = [version]
            return replace(beat, wait=wait)

        answer = link.exchange(self._order, newest)
        if isinstance(answer, Answer):
            self._mailbox.delivered(taken[0])
        self._deliver(answer)
        if isinstance(answer, Refusal):
            self._mailbox.pause(random.uniform(*RETRY_SECONDS))  # noqa: S311 - jitter
        return answer

    def _poll(self, link: Link) -> None:
        while not self._mailbox.closed:
            answer = self._exchange(link, BEAT_SECONDS)
            if isinstance(answer, Answer):
                # What was not obeyed yet would be answered with the same at once.
                self._mailbox.wait_seen(answer.directive.revision, BEAT_SECONDS / 4)
                self._mailbox.pause(0.01)  # a coordinator that holds nothing back must not make us spin
        link.close()

    def _report(self, link: Link) -> None:
        while not self._mailbox.closed:
            self._mailbox.wait_undelivered()
            if not self._mailbox.closed:
                self._exchange(link, 0.0)
        link.close()
