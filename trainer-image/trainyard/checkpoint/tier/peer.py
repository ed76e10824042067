"""Shards that another node keeps, as a source for a reader on this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from trainyard.checkpoint.errors import NotFound, ShardInvalid, StoreUnavailable
from trainyard.checkpoint.format.digest import Descriptor
from trainyard.checkpoint.sources import parse_descriptor
from trainyard.checkpoint.tier.wire import MOST_LINE, Address, Declined, Line, connect
from trainyard_api.checkpoints import Shard

T = TypeVar("T")
_MOST_FAILURES = 3
"""In a row, after which the node is not asked any more: each may have cost a time-out."""


class PeerSource:
    """Another node's uploader. Several threads may ask at once, each over a connection of its own."""

    name = "peer"

    def __init__(self, address: Address, keys: Collection[str]) -> None:
        self._address = address
        self._keys = frozenset(keys)
        self._idle: queue.LifoQueue[Line] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._failures = 0

    def descriptor(self, shard: Shard) -> Descriptor:
        def ask(line: Line) -> bytes:
            size = int(line.ask({"op": "descriptor", "key": shard.key})["size"])
            if not 0 <= size <= MOST_LINE:
                raise ShardInvalid(f"{shard.key}: {self._address!r} has a descriptor of {size} bytes")
            data = bytearray(size)
            line.read_into(memoryview(data))
            return bytes(data)

        return parse_descriptor(self._with_line(shard, ask), shard)

    def read_into(self, shard: Shard, begin: int, buffer: memoryview) -> None:
        def ask(line: Line) -> None:
            answer = line.ask({"op": "read", "key": shard.key, "begin": begin, "size": len(buffer)})
            if answer.get("size") != len(buffer):
                raise ShardInvalid(f"{shard.key}: {self._address!r} sends {answer.get('size')} bytes")
            line.read_into(buffer)

        self._with_line(shard, ask)

    def close(self) -> None:
        """Of the connections that are idle; more may be made."""
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return

    def _with_line(self, shard: Shard, call: Callable[[Line], T]) -> T:
        if shard.key not in self._keys or self._failures >= _MOST_FAILURES:
            raise NotFound(f"{shard.key}: not on {self._address!r}")
        line: Line | None = None
        try:
            line = self._take()
            found = call(line)
        except Declined as error:
            if line is not None:
                self._idle.put(line)
            raise NotFound(f"{shard.key}: {self._address!r} says: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, ShardInvalid) as error:
            if line is not None:
                line.close()
            with self._lock:
                self._failures += 1
            if isinstance(error, ShardInvalid):
                raise
            raise StoreUnavailable(f"{shard.key}: {self._address!r}: {_words(error)}") from error
        self._idle.put(line)
        with self._lock:
            self._failures = 0
        return found

    def _take(self) -> Line:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return connect(self._address)


def _words(error: Any) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
