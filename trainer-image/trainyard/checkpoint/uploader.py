"""The uploader process: `python3 -m trainyard.checkpoint.uploader (--socket S | --channel FD --worker PID) --staging DIR`.

In a pod it is a child of the agent and listens on a socket; elsewhere it is a child of one worker and has one end of a
socket pair. Either way what is staged is uploaded and committed though the worker has died. It takes its store from the
environment (contract.Env.CHECKPOINT_*, RUN_UID, AWS_*). On SIGTERM it takes no more, finishes what it has for up to
`--drain` seconds, and exits; without an agent, it does so for up to `--orphan-seconds` when its worker has hung up.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import CheckpointError, StoreConfigError, StoreError, exit_code
from trainyard.checkpoint.messages import Outcome, Staged, from_line, to_line
from trainyard.checkpoint.stores import Store, open_store
from trainyard.checkpoint.tier.copies import gang_from, open_neighbours
from trainyard.checkpoint.uploads import PEERS_SECONDS, UPLOAD_SECONDS, UploadService
from trainyard_api.contract import ExitCode
from trainyard_api.serde import encode

log = logging.getLogger("trainyard.checkpoint")

ORPHAN_SECONDS = 300.0
"""How long a worker's own uploader goes on without it."""
_MAX_LINE = 4 << 20
_MAX_FLUSH = 60.0
_SETTLE_SECONDS = 30.0
"""For the deletion of old checkpoints, once all is committed."""
_LOOK_SECONDS = 0.5


class Session:
    """One client: worker or agent. Any number of requests, answers as they come."""

    def __init__(self, service: UploadService, refused: str, write: Callable[[bytes], Any]) -> None:
        self._service = service
        self._refused = refused
        self._write = write
        self._writing = threading.Lock()
        self._leave = contextlib.ExitStack()

    def run(self, lines: BinaryIO) -> None:
        """Until the client hangs up."""
        with self._leave, contextlib.suppress(OSError):
            while line := lines.readline(_MAX_LINE):
                try:
                    self._obey(from_line(line))
                except (ValueError, TypeError) as error:
                    self._say({"op": "error", "reason": str(error)[:500]})

    def _obey(self, message: dict[str, Any]) -> None:
        service = self._service
        match message["op"]:
            case "staged":
                service.submit(Staged.from_message(message), self._tell)
            case "abandoned":
                service.keeper.staging_failed()
            case "subscribe":
                self._leave.callback(service.subscribe(self._say))
                if self._refused:
                    self._say({"op": "refused", "message": self._refused})
            case "flush":
                seconds = float(message.get("seconds", 0.0))
                self._say({"op": "flushed", "pending": service.flush(min(seconds, _MAX_FLUSH))})
            case "address":
                near = service.neighbours
                self._say({"op": "address", **({"address": encode(near.address)} if near else {})})
            case "peers":
                if service.neighbours is not None:
                    service.neighbours.meet(gang_from(message))
                self._say({"op": "peers"})
            case other:
                raise ValueError(f"unknown op {other!r}")

    def _tell(self, outcome: Outcome) -> None:
        self._send(outcome.line())

    def _say(self, message: dict[str, Any]) -> None:
        self._send(to_line(message))

    def _send(self, line: bytes) -> None:
        with self._writing:
            self._write(line)


class _Connection(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        Session(self.server.service, self.server.refused, self.wfile.write).run(cast(BinaryIO, self.rfile))


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, path: str, service: UploadService, refused: str = "") -> None:
        Path(path).unlink(missing_ok=True)
        before = os.umask(0o177)  # for this user's processes only
        try:
            super().__init__(path, _Connection)
        finally:
            os.umask(before)
        self.service = service
        self.refused = refused


def refusal(store: Store) -> str:
    """Why the store will never take anything (bucket, credentials, permission); empty when it may.

    Asked before any worker exists: importing torch takes longer than this, and a store that is only away for the
    moment is the workers' business, who try again.
    """
    try:
        store.list("commits/")
    except StoreConfigError as error:
        return str(error)
    except StoreError as error:
        log.warning("%s", error)
    return ""


def serve(path: str, service: UploadService, *, drain: float, refused: str = "") -> int:
    """Until SIGTERM or SIGINT; returns how many shards were left when it ended. Subscribers hear of `refused`."""
    stop = _stopped_by_signals()
    with _Server(path, service, refused) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        stop.wait()
        server.shutdown()
        left = service.flush(drain)
    Path(path).unlink(missing_ok=True)
    return left


def serve_worker(channel: socket.socket, worker: int, service: UploadService, *, orphan: float) -> int:
    """Until the worker, process `worker`, hangs up or is gone, and then as long as it takes to finish, at most `orphan`
    seconds; returns how many shards were left."""
    stop = _stopped_by_signals()

    def listen() -> None:
        with channel.makefile("rb") as lines:
            Session(service, "", channel.sendall).run(lines)
        stop.set()

    threading.Thread(target=listen, name="worker", daemon=True).start()
    # The end of the stream alone does not tell: the worker's own children may hold its end open after its death.
    while not stop.wait(_LOOK_SECONDS) and os.getppid() == worker:
        pass
    if left := service.flush(0):
        log.info("the worker is gone; its %d staged shards get up to %g s to be committed", left, orphan)
        begin = time.monotonic()
        left = service.flush(orphan)
        if not left:
            log.info("done after %.1f s", time.monotonic() - begin)
    service.settle(_SETTLE_SECONDS)
    return left


def _stopped_by_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """While it is locked, nobody's sweep takes a temporary folder for abandoned. The worker holds it too, perhaps alone:
    then this lock is taken over at its death."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def lock() -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)

    threading.Thread(target=lock, name="folder", daemon=True).start()
    yield
    # The descriptor stays open until the process ends: the folder is removed under the lock.


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="uploader: %(message)s")
    log.setLevel(logging.INFO)
    try:
        config = CheckpointConfig.from_env(os.environ)
        if config is None:
            raise ValueError("TRAINYARD_CHECKPOINT_URI is not set")
        store = open_store(config)
    except (ValueError, CheckpointError) as error:
        log.error("%s", error)
        return exit_code(error) if isinstance(error, CheckpointError) else int(ExitCode.CONFIG)
    options.staging.mkdir(parents=True, exist_ok=True)
    service = UploadService(
        store, config.run_id, staging=options.staging, keep=config.keep, keep_best=config.keep_best,
        local=(config.local or config.copies > 0) and not options.temporary,
        upload_seconds=options.upload_seconds, peers_seconds=options.peers_seconds,
    )  # fmt: skip
    if service.keeper.on:
        service.neighbours = open_neighbours(options.staging, service.keeper, service.warn)
    if options.socket:
        left = serve(options.socket, service, drain=options.drain, refused=refusal(store))
    else:
        with _held(options.staging):
            left = serve_worker(
                socket.socket(fileno=options.channel), options.worker, service, orphan=options.orphan_seconds
            )
            if options.temporary:
                shutil.rmtree(options.staging, ignore_errors=True)
    if left:
        log.warning("%d staged shards were not uploaded in time", left)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainyard.checkpoint.uploader", description=__doc__)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--socket", help="unix socket to listen on")
    place.add_argument(
        "--channel", type=int, help="descriptor of a connected socket, whose other end a worker has"
    )
    parser.add_argument("--worker", type=int, default=0, help="process id of that worker, the parent")
    parser.add_argument("--staging", required=True, type=Path, help="folder of staged shards")
    parser.add_argument("--temporary", action="store_true", help="remove that folder at the end")
    parser.add_argument(
        "--upload-seconds", type=float, default=UPLOAD_SECONDS, help="patience with the store"
    )
    parser.add_argument(
        "--peers-seconds", type=float, default=PEERS_SECONDS, help="patience with other ranks"
    )
    parser.add_argument("--drain", type=float, default=20.0, help="seconds to finish after SIGTERM")
    parser.add_argument(
        "--orphan-seconds",
        type=float,
        default=ORPHAN_SECONDS,
        help="seconds to finish after the worker's end",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
