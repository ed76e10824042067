"""A worker's line to the agent of its pod: fire and forget.

Nothing here may slow training down or end it: the socket never blocks, and no error leaves this module.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import socket
import threading
import time
from typing import Any

from trainyard_api.contract import Env

LEAST_INTERVAL = 0.2
"""Seconds between two progress messages; the first step of the attempt and the last one are never held back."""


class AgentClient:
    """`from_env()` gives one inside a pod, and None anywhere else. Safe to use from several threads."""

    def __init__(self, path: str, *, attempt: int, local_rank: int) -> None:
        self._path = path
        self._attempt = attempt
        self._local_rank = local_rank
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._pid = os.getpid()
        self._unsent = b""
        """Rest of a message that the socket took only a part of."""
        self._held: dict[str, Any] | None = None
        """The newest progress that came too early."""
        self._sent_at = -math.inf
        atexit.register(self.close)

    @classmethod
    def from_env(cls) -> AgentClient | None:
        """The client of this worker; None when there is no agent."""
        path, attempt = os.environ.get(Env.AGENT_SOCKET), os.environ.get(Env.ATTEMPT, "")
        if not path or not attempt.isdigit():
            return None
        local_rank = os.environ.get("LOCAL_RANK", "0")
        return cls(path, attempt=int(attempt), local_rank=int(local_rank) if local_rank.isdigit() else 0)

    def progress(
        self,
        step: int,
        total_steps: int | None = None,
        epoch: int = 0,
        loss: float | None = None,
        samples_per_second: float | None = None,
    ) -> None:
        """The optimizer step `step` (counted from the run's start) has just ended.

        Only local rank 0 is heard. Costs a dictionary when it is held back, one non-blocking write when not.
        """
        if self._local_rank != 0:
            return
        message = {
            "op": "progress",
            "step": step,
            "total_steps": total_steps,
            "epoch": epoch,
            "loss": _finite(loss),
            "samples_per_second": _finite(samples_per_second),
            "time": time.time(),
        }
        now = time.monotonic()
        with self._lock:
            if now - self._sent_at < LEAST_INTERVAL and step != total_steps:
                self._held = message
                return
            self._held = None
            self._sent_at = now
            self._send(message)

    def resumed(self, step: int, uri: str = "", fell_back: str = "") -> None:
        """Where this attempt starts: the commit `uri` of `step`, or ("", 0) from nothing; why newer were passed over."""
        if self._local_rank != 0:
            return
        with self._lock:
            self._send({"op": "resumed", "step": step, "uri": uri, "fell_back": fell_back})

    def close(self) -> None:
        """Sends what was held back. Called at the interpreter's exit, too."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._held is not None:
                self._send(self._held)
                self._held = None
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        atexit.unregister(self.close)

    def _send(self, message: dict[str, Any]) -> None:
        if os.getpid() != self._pid:  # a DataLoader's worker has a copy of this object
            return
        try:
            data = (
                json.dumps({**message, "attempt": self._attempt, "local_rank": self._local_rank}).encode()
                + b"\n"
            )
            if self._socket is None:
                self._socket = self._connect()
            if self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            if not self._unsent:
                self._unsent = data[self._socket.send(data) :]
        except BlockingIOError:  # the agent is behind; a newer message will do
            pass
        except (OSError, ValueError, TypeError):
            if self._socket is not None:
                self._socket.close()
            self._socket, self._unsent = None, b""

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(self._path)
        except OSError:
            connection.close()
            raise
        return connection


def _finite(value: float | None) -> float | None:
    """A number that JSON can carry, or None."""
    return float(value) if value is not None and math.isfinite(value) else None
