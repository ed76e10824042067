"""What an uploader does for other nodes: gives what is kept here to their workers, keeps copies of their shards."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from trainyard.checkpoint.errors import ShardInvalid
from trainyard.checkpoint.format.digest import Descriptor, spans
from trainyard.checkpoint.sources import descriptor_of
from trainyard.checkpoint.tier.keeper import Keeper, Shelf
from trainyard.checkpoint.tier.rules import Save, save_of
from trainyard.checkpoint.tier.wire import Address, Line, welcome

log = logging.getLogger("trainyard.checkpoint")

_MOST_CONNECTIONS = 64
_CHUNK = 1 << 20
_SLOWEST = 1 << 20
"""Bytes a second, below which a copy is given up."""
_SOME_SECONDS = 30.0


class PeerServer:
    """Listens on one address until the process ends; a thread for each connection."""

    def __init__(self, keeper: Keeper, host: str, *, port: int = 0, token: str = "") -> None:
        """`port` and `token`: of the uploader that was here before, so that its neighbours still find this one.
        Raises OSError."""
        self._keeper = keeper
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=_MOST_CONNECTIONS)
        self.address = Address(
            host=host, port=int(self._socket.getsockname()[1]), token=token or secrets.token_hex(32)
        )
        self._slots = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        threading.Thread(target=self._accept, name="tier", daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED):
                    time.sleep(0.1)
                    continue
                return  # closed
            if not self._slots.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="tier-peer", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                line = welcome(connection, self.address.token)
                with contextlib.closing(line):
                    while (message := line.receive(idle=True)) is not None:
                        self._obey(line, message)
        finally:
            self._slots.release()

    def _obey(self, line: Line, message: dict[str, Any]) -> None:
        """Raises OSError when the connection is of no more use."""
        doing: dict[Any, Callable[[Line, dict[str, Any]], None]] = {
            "descriptor": self._descriptor, "read": self._read, "keep": self._keep, "committed": self._committed,
        }  # fmt: skip
        try:
            doing[message.get("op")](line, message)
        except _Refused as error:
            line.send({"ok": False, "reason": str(error)})
        except (ValueError, TypeError, KeyError, ShardInvalid) as error:
            line.send({"ok": False, "reason": f"{type(error).__name__}: {error}"[:300]})

    def _shelf(self, key: str) -> Shelf:
        for shelf in (self._keeper.own, self._keeper.copies):
            if shelf.path(key) and shelf.holds(key):
                return shelf
        raise _Refused("not here")

    def _descriptor(self, line: Line, message: dict[str, Any]) -> None:
        key = str(message["key"])
        path = self._shelf(key).root / descriptor_of(key)
        with _reading(path) as file:
            size = path.stat().st_size
            line.send({"ok": True, "size": size})
            line.send_file(file, 0, size)

    def _read(self, line: Line, message: dict[str, Any]) -> None:
        key, begin, size = str(message["key"]), int(message["begin"]), int(message["size"])
        path = self._shelf(key).path(key)
        with self._keeper.pinned(path), _reading(path) as file:
            if not 0 <= begin <= begin + size <= path.stat().st_size:
                raise ValueError(f"no bytes {begin} to {begin + size}")
            line.send({"ok": True, "size": size})
            if size:
                line.send_file(file, begin, size)

    def _committed(self, line: Line, message: dict[str, Any]) -> None:
        self._keeper.heard((int(message["attempt"]), int(message["step"])))
        line.send({"ok": True})

    def _keep(self, line: Line, message: dict[str, Any]) -> None:
        """The answer says whether the bytes are wanted; after them comes a second one."""
        descriptor = Descriptor.from_json(message["descriptor"])
        shard, shelf = descriptor.shard, self._keeper.copies
        save, path = save_of(shard.key), shelf.path(shard.key)
        if shelf.holds(shard.key) or self._keeper.own.holds(shard.key):
            line.send({"ok": True, "have": True})
            return
        if not self._keeper.takes_copy(save, shard.size):
            raise _Refused("no room for it")
        line.send({"ok": True, "have": False})
        with self._keeper.receiving(save, shard.rank):
            self._receive(line, descriptor, path, save)
        line.send({"ok": True})

    def _receive(self, line: Line, descriptor: Descriptor, path: Path, save: Save) -> None:
        """Raises ShardInvalid for bytes that are not what the descriptor says; OSError, of the connection or the disk."""
        shard = descriptor.shard
        deadline = time.monotonic() + _SOME_SECONDS + shard.size / _SLOWEST
        buffer = memoryview(bytearray(min(_CHUNK, shard.size)))
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _disk(self._keeper), temporary.open("wb", buffering=0) as file:
                for (begin, end), expected in zip(
                    spans(shard.size, shard.part_size), descriptor.parts, strict=True
                ):
                    seen = hashlib.sha256()
                    for at in range(begin, end, len(buffer)):
                        piece = buffer[: min(len(buffer), end - at)]
                        line.read_into(piece)
                        seen.update(piece)
                        file.write(piece)
                    if seen.hexdigest() != expected:
                        # What follows of it is not read: the connection is of no more use.
                        line.send(
                            {"ok": False, "reason": f"bytes {begin} to {end} are not what they should be"}
                        )
                        raise ConnectionAbortedError("a copy that is not what it should be")
                    if time.monotonic() > deadline:
                        raise TimeoutError("a copy that is too slow")
            temporary.replace(path)
            self._keeper.copies.put(descriptor)
        finally:
            temporary.unlink(missing_ok=True)


class _Refused(Exception):
    """With the reason that is told."""


@contextlib.contextmanager
def _reading(path: Path) -> Any:
    try:
        file = path.open("rb")
    except OSError as error:
        raise _Refused("not here") from error
    with file:
        yield file


@contextlib.contextmanager
def _disk(keeper: Keeper) -> Any:
    """A disk that is full costs the copies, no more."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            keeper.no_copies(f"{keeper.own.root} is full: copies of other nodes are not kept here any more")
        raise
