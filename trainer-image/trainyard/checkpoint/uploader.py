"""The uploader process of a pod: `python3 -m trainyard.checkpoint.uploader --socket S --staging DIR`.

A child of the agent, so that what is staged is uploaded and committed though the worker has died. It takes its store
from the environment (contract.Env.CHECKPOINT_*, RUN_UID, AWS_*). On SIGTERM it takes no more, finishes what it has for
up to `--drain` seconds, and exits.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socketserver
import sys
import threading
from pathlib import Path
from typing import Any

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import CheckpointError, StoreConfigError, StoreError, exit_code
from trainyard.checkpoint.messages import Outcome, Staged, from_line, to_line
from trainyard.checkpoint.stores import Store, open_store
from trainyard.checkpoint.uploads import PEERS_SECONDS, UPLOAD_SECONDS, UploadService
from trainyard_api.contract import ExitCode

log = logging.getLogger("trainyard.checkpoint")

_MAX_LINE = 256 * 1024
_MAX_FLUSH = 60.0


class _Connection(socketserver.StreamRequestHandler):
    """One client: worker or agent. Any number of requests, answers as they come."""

    server: _Server

    def setup(self) -> None:
        super().setup()
        self._writing = threading.Lock()
        self._leave = contextlib.ExitStack()

    def handle(self) -> None:
        with self._leave, contextlib.suppress(OSError):
            while line := self.rfile.readline(_MAX_LINE):
                try:
                    self._obey(from_line(line))
                except ValueError as error:
                    self._say({"op": "error", "reason": str(error)[:500]})

    def _obey(self, message: dict[str, Any]) -> None:
        service = self.server.service
        match message["op"]:
            case "staged":
                service.submit(Staged.from_message(message), self._tell)
            case "subscribe":
                self._leave.callback(service.subscribe(self._say))
                if self.server.refused:
                    self._say({"op": "refused", "message": self.server.refused})
            case "flush":
                seconds = float(message.get("seconds", 0.0))
                self._say({"op": "flushed", "pending": service.flush(min(seconds, _MAX_FLUSH))})
            case other:
                raise ValueError(f"unknown op {other!r}")

    def _tell(self, outcome: Outcome) -> None:
        self._send(outcome.line())

    def _say(self, message: dict[str, Any]) -> None:
        self._send(to_line(message))

    def _send(self, line: bytes) -> None:
        with self._writing:
            self.wfile.write(line)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, socket: str, service: UploadService, refused: str = "") -> None:
        Path(socket).unlink(missing_ok=True)
        super().__init__(socket, _Connection)
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


def serve(socket: str, service: UploadService, *, drain: float, refused: str = "") -> int:
    """Until SIGTERM or SIGINT; returns how many shards were left when it ended. Subscribers hear of `refused`."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with _Server(socket, service, refused) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        stop.wait()
        server.shutdown()
        left = service.flush(drain)
    Path(socket).unlink(missing_ok=True)
    return left


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainyard.checkpoint.uploader", description=__doc__)
    parser.add_argument("--socket", required=True, help="unix socket to listen on")
    parser.add_argument("--staging", required=True, type=Path, help="folder of staged shards")
    parser.add_argument(
        "--upload-seconds", type=float, default=UPLOAD_SECONDS, help="patience with the store"
    )
    parser.add_argument(
        "--peers-seconds", type=float, default=PEERS_SECONDS, help="patience with other ranks"
    )
    parser.add_argument("--drain", type=float, default=20.0, help="seconds to finish after SIGTERM")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="uploader: %(message)s")
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
        store, config.run_id, staging=options.staging, keep=config.keep,
        upload_seconds=options.upload_seconds, peers_seconds=options.peers_seconds,
    )  # fmt: skip
    left = serve(options.socket, service, drain=options.drain, refused=refusal(store))
    if left:
        log.warning("%d staged shards were not uploaded in time", left)
    return 0


if __name__ == "__main__":
    sys.exit(main())
