"""The worker's side of an uploader: the pod's one, a child process of its own, or a thread."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import trainyard
import trainyard_api
from trainyard.checkpoint.config import CheckpointConfig, KeepBest
from trainyard.checkpoint.errors import CheckpointError
from trainyard.checkpoint.messages import Outcome, Staged, from_line, to_line
from trainyard.checkpoint.stores import Store
from trainyard.checkpoint.uploads import UploadService
from trainyard_api.contract import Env, ExitCode

log = logging.getLogger("trainyard.checkpoint")

_LINGER_SECONDS = 1.0
_MOST_DEATHS = 5
_DEATH_SECONDS = 0.2
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

    def close(self) -> bool:
        """Whether the uploader goes on with what is staged, and removes the staging folder itself when it is done."""
        ...


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
    """In a thread, for directories: what is in flight ends with the process."""

    def __init__(
        self, store: Store, run: str, *, staging: Path, keep: int, keep_best: KeepBest | None = None
    ) -> None:
        super().__init__()
        self._service = UploadService(store, run, staging=staging, keep=keep, keep_best=keep_best)

    def submit(self, staged: Staged) -> None:
        self._begin(staged)
        self._service.submit(staged, self._heard)

    def flush(self, seconds: float) -> None:
        """Nothing: an uploader that is born with this process has no older saves."""

    def close(self) -> bool:
        """Nobody goes on when this process ends: what is in flight gets a moment to be committed, and what it replaces to
        be deleted."""
        if self.busy:
            self.take(_LINGER_SECONDS)
        self._service.settle(_LINGER_SECONDS)
        return False


class _Channel(_OneInFlight):
    """Over a stream to an uploader process. A lost connection is made again and the shard submitted again."""

    def __init__(self) -> None:
        super().__init__()
        self._sending = threading.Lock()
        self._closed = False
        self._flushed = threading.Event()
        self._hopeless = ""
        """Why no uploader will answer any more."""
        self._socket = self._connect()
        threading.Thread(target=self._listen, name="uploader-client", daemon=True).start()

    def _connect(self) -> socket.socket:
        """Raises CheckpointError when there is no hope."""
        raise NotImplementedError

    def submit(self, staged: Staged) -> None:
        self._begin(staged)
        if self._hopeless:
            self._give_up(self._hopeless)
        else:
            self._send(staged.line())

    def abandon(self, staged: Staged, reason: str) -> None:
        super().abandon(staged, reason)
        self._send(to_line({"op": "abandoned"}))

    def flush(self, seconds: float) -> None:
        self._flushed.clear()
        self._send(to_line({"op": "flush", "seconds": seconds}))
        self._flushed.wait(seconds + 1.0)

    def close(self) -> bool:
        self._closed = True
        with self._sending, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        return False

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
                self._hopeless = str(error)
                log.warning("%s", error)
                self._give_up(self._hopeless)
                return
            with self._sending:
                self._socket = connection
            if self._closed:  # meanwhile
                connection.close()
                return
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


class SocketUploads(_Channel):
    """The uploader of this pod, which the agent keeps alive."""

    def __init__(self, path: str) -> None:
        self._path = path
        super().__init__()

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


class ChildUploads(_Channel):
    """An uploader process of this worker's own. It outlives the worker until what is staged is committed."""

    def __init__(self, config: CheckpointConfig, staging: Path, env: Mapping[str, str] = os.environ) -> None:
        self._env = _child_env(config, env)
        self._arguments = ["--staging", str(staging), "--worker", str(os.getpid())]
        if not env.get(Env.RUNTIME_DIR):
            self._arguments.append("--temporary")
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths = 0
        super().__init__()

    def flush(self, seconds: float) -> None:
        """Nothing: an uploader that is born with this process has no older saves."""

    def close(self) -> bool:
        """It goes on without us: a moment to end is all it gets here."""
        super().close()
        process = self._process
        if process is None:
            return False
        try:
            process.wait(_LINGER_SECONDS)
        except subprocess.TimeoutExpired:
            if self.busy:
                log.info("the checkpoint in flight is seen through by process %d", process.pid)
            return True
        return False

    def _connect(self) -> socket.socket:
        if self._process is not None:
            code = self._process.wait()
            self._deaths += 1
            if code == int(ExitCode.CONFIG) or self._deaths > _MOST_DEATHS:
                raise CheckpointError(f"the uploader process ended with code {code}, {self._deaths} times")
            log.warning("the uploader process ended with code %d; starting another one", code)
            time.sleep(_DEATH_SECONDS * self._deaths)
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [
            sys.executable,
            "-P",
            "-m",
            "trainyard.checkpoint.uploader",
            "--channel",
            str(its.fileno()),
        ]
        with its:
            try:
                # A session of its own: neither Ctrl-C nor the end of the terminal is meant for it.
                self._process = subprocess.Popen(
                    [*command, *self._arguments], env=self._env, pass_fds=(its.fileno(),), start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise CheckpointError(
                    f"the uploader process could not be started: {error.strerror}"
                ) from error
        return ours


def _child_env(config: CheckpointConfig, env: Mapping[str, str]) -> dict[str, str]:
    """What `CheckpointConfig.from_env` reads back, and where our packages are."""
    best = config.keep_best
    ours = {
        Env.CHECKPOINT_URI: config.uri,
        Env.CHECKPOINT_ENDPOINT: config.endpoint or "",
        Env.CHECKPOINT_REGION: config.region or "",
        Env.CHECKPOINT_KEEP: str(config.keep),
        Env.CHECKPOINT_KEEP_BEST: f"{best.metric}:{best.mode}:{best.count}" if best else "",
        Env.CHECKPOINT_LOCAL: "1" if config.local else "",
        Env.RUN_UID: config.run_id,
    }
    packages = {str(Path(module.__file__ or "").parents[1]) for module in (trainyard, trainyard_api)}
    paths = [*sorted(packages), *filter(None, [env.get("PYTHONPATH")])]
    others = {name: value for name, value in env.items() if not name.startswith("TRAINYARD_")}
    return {**others, **{str(k): v for k, v in ours.items()}, "PYTHONPATH": os.pathsep.join(paths)}


def open_uploads(
    config: CheckpointConfig, store: Store, staging: Path, env: Mapping[str, str] = os.environ
) -> Uploads:
    """The pod's uploader if there is one, else one of this process's own."""
    path = env.get(Env.UPLOADER_SOCKET)
    if path:
        return SocketUploads(path)
    if config.uri.startswith("s3://"):
        return ChildUploads(config, staging, env)
    return LocalUploads(store, config.run_id, staging=staging, keep=config.keep, keep_best=config.keep_best)
