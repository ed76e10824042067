"""The agent's end of the zygote: start it, know whether it is warm, ask it for launchers.

The other end is `trainyard.elastic.zygote`. A fresh launcher (no zygote) speaks the same protocol, for one request.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from trainyard_agent.child import spawn
from trainyard_agent.launchrequest import LaunchRequest, send_request
from trainyard_agent.lines import Closed, LineReader

WARM_SECONDS = 180.0
"""Longest time to import torch and the preloaded modules."""
REPLY_SECONDS = 15.0
"""Longest time from a launch request to its answer; a fork takes milliseconds, a busy machine more."""
RETRY_SECONDS = (0.2, 1.0, 5.0, 30.0)
"""Pauses before the zygote is started again."""
QUICK_DEATHS = 3
"""Deaths in a row before it ever was warm: it is unusable, launchers are fresh processes from then on."""


class LaunchFailed(Exception):
    """A launch was asked for and did not succeed; whether something was started is not known."""


class NotUsable(Exception):
    """The zygote refused to fork (it says why); nothing was started."""


class NotThere(Exception):
    """The zygote is gone; nothing was started."""


class Channel:
    """A child with a socket: a zygote, or a fresh launcher."""

    def __init__(self, module: str, env: dict[str, str]) -> None:
        """Starts `python -m module`. Raises OSError."""
        self._socket, theirs = socket.socketpair()
        try:
            self.pid = spawn(["-m", module], env, channel=theirs.fileno())
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._socket.setblocking(False)
        self._reader = LineReader(self._socket.fileno())

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, request: LaunchRequest, fds: list[int]) -> None:
        """Raises OSError."""
        send_request(self._socket, request, fds)

    def read(self, bound: float = 0.0) -> list[dict[str, Any]]:
        """Messages that are there within `bound` seconds. Raises Closed."""
        waiter = select.poll()
        waiter.register(self._socket, select.POLLIN)
        return self._reader.read() if waiter.poll(bound * 1000) else []

    def close(self) -> None:
        self._socket.close()


class Zygote:
    """Keeps one zygote alive. `changed` is called when `warm` or `usable` changed."""

    def __init__(
        self,
        env: dict[str, str],
        selector: selectors.BaseSelector,
        *,
        changed: Callable[[], None],
        warn: Callable[[str], None],
    ) -> None:
        self._env = env
        self._selector = selector
        self._changed, self._warn = changed, warn
        self._channel: Channel | None = None
        self._deaths = 0
        self._start_at = 0.0
        self._warm_by = 0.0
        self.warm = False
        self.usable = True

    @property
    def pid(self) -> int | None:
        return self._channel.pid if self._channel else None

    def launch(self, request: LaunchRequest, fds: list[int]) -> int:
        """PID of a launcher that was forked for `request`; it is a child of this process.

        Waits for the answer, so that no launch is ever half done. Raises NotThere, NotUsable, LaunchFailed.
        """
        channel = self._channel
        if channel is None or not self.warm:
            raise NotThere
        try:
            channel.send(request, fds)
        except ConnectionError:
            raise NotThere from None
        except OSError as error:
            self._kill()
            raise LaunchFailed(f"the zygote did not take the launch request: {error}") from None
        deadline = time.monotonic() + REPLY_SECONDS
        try:
            while (left := deadline - time.monotonic()) > 0:
                for message in channel.read(left):
                    if message.get("op") == "launched":
                        return int(message["pid"])
                    if message.get("op") == "refused":
                        raise NotUsable(str(message.get("message", "")))
                    self._heard(message)
        except Closed:
            self._died("it ended")
            raise LaunchFailed("the zygote ended while it started the launcher") from None
        self._kill()
        raise LaunchFailed(f"the zygote did not answer within {REPLY_SECONDS:.0f} s")

    def give_up(self, why: str) -> None:
        """It is of no use: fresh launchers from now on."""
        self.usable = False
        self._drop()
        self._warn(f"zygote not used: {why}; attempts start slower")
        self._changed()

    def tick(self, now: float) -> float:
        """Starts it when it is time to; the monotonic time of the next call that is needed."""
        if not self.usable:
            return float("inf")
        if self._channel is None:
            if now < self._start_at:
                return self._start_at
            self._start(now)
        elif not self.warm and now > self._warm_by:
            self.give_up(f"its imports took more than {WARM_SECONDS:.0f} s")
            return float("inf")
        return float("inf") if self.warm else self._warm_by

    def exited(self, pid: int) -> bool:
        """The child `pid` was reaped; whether that was the zygote."""
        if self._channel is None or pid != self._channel.pid:
            return False
        self._died("it ended")
        return True

    def close(self) -> None:
        """Closes the channel, at which the zygote ends."""
        self.usable = False
        self._drop()

    def _start(self, now: float) -> None:
        self._warm_by = now + WARM_SECONDS
        try:
            self._channel = Channel("trainyard.elastic.zygote", self._env)
        except OSError as error:
            self._died(str(error))
            return
        self._selector.register(self._channel, selectors.EVENT_READ, self._readable)

    def _kill(self) -> None:
        if self._channel is not None:
            with suppress(ProcessLookupError):
                os.kill(self._channel.pid, signal.SIGKILL)
        self._died("it did not answer")

    def _drop(self) -> None:
        if self._channel is not None:
            self._selector.unregister(self._channel)
            self._channel.close()
            self._channel = None
        self.warm = False

    def _died(self, why: str) -> None:
        self._deaths = 0 if self.warm else self._deaths + 1
        self._drop()
        if self._deaths >= QUICK_DEATHS:
            self.give_up(f"{self._deaths} times it ended before it was warm ({why})")
            return
        self._start_at = time.monotonic() + RETRY_SECONDS[min(self._deaths, len(RETRY_SECONDS) - 1)]
        self._changed()

    def _readable(self) -> None:
        try:
            messages = self._channel.read() if self._channel else []
        except Closed:
            self._died("it ended")
            return
        for message in messages:
            self._heard(message)

    def _heard(self, message: dict[str, Any]) -> None:
        op = message.get("op")
        if op == "ready":
            self.warm = True
            self._deaths = 0
            self._changed()
        elif op == "warning":
            self._warn(str(message.get("message", "")))
