"""What an uploader tells other nodes: its shards to the next ones of the ring, and to all that a save is committed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainyard.checkpoint.format.digest import Descriptor
from trainyard.checkpoint.tier.keeper import Keeper, write_whole
from trainyard.checkpoint.tier.rules import Save, ring, save_of
from trainyard.checkpoint.tier.server import PeerServer
from trainyard.checkpoint.tier.wire import Address, Declined, connect
from trainyard_api.contract import Env
from trainyard_api.serde import decode, encode

log = logging.getLogger("trainyard.checkpoint")

_FILE = "peers.json"
_TRIES = 3
_AGAIN_SECONDS = 1.0
"""An uploader that was killed is back after about this time, at the same address."""
_MESSENGERS = 8
_WAITING = 64
"""Shards that wait to be copied, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """The uploaders of an attempt's nodes."""

    me: int
    """Index of this one."""
    nodes: list[Address]
    copies: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """For an uploader that takes the place of one that was killed. Only this user may read it."""

    address: Address
    gang: Gang | None = None


class Neighbours:
    """Everything happens in threads of its own, and what fails is a warning, once for each node."""

    def __init__(self, root: Path, keeper: Keeper, warn: Callable[[str], None], *, host: str) -> None:
        """Raises OSError when it cannot listen on `host`."""
        self._root, self._keeper, self._warn = root, keeper, warn
        self._server, self._gang = _open_server(root, keeper, host)
        self._lock = threading.Lock()
        self._warned: set[tuple[str, int]] = set()
        self._shards: queue.Queue[tuple[Path, Descriptor]] = queue.Queue(_WAITING)
        self._newest: dict[int, Save] = {}
        """By rank, of shards that are to be copied: an older one is not, any more."""
        self._news = threading.Condition()
        self._committed: Save | None = None
        for work, name in ((self._copy_all, "tier-copies"), (self._tell_all, "tier-news")):
            threading.Thread(target=work, name=name, daemon=True).start()
        self._remember()

    @property
    def address(self) -> Address:
        return self._server.address

    def meet(self, gang: Gang) -> None:
        """From now on these are the nodes. Raises ValueError."""
        if not 0 <= gang.me < len(gang.nodes) or gang.copies < 0:
            raise ValueError(f"peers: node {gang.me} of {len(gang.nodes)}")
        with self._lock:
            self._gang = gang
            self._warned.clear()
        self._remember()

    def copy(self, path: Path, descriptor: Descriptor) -> None:
        with self._lock:
            if self._gang is None or not self._gang.copies:
                return
            shard = descriptor.shard
            self._newest[shard.rank] = max(save_of(shard.key), self._newest.get(shard.rank, (0, 0)))
        with contextlib.suppress(queue.Full):  # the line is that slow: this one has no copy
            self._shards.put_nowait((path, descriptor))

    def committed(self, attempt: int, step: int) -> None:
        with self._news:
            self._committed = (attempt, step)
            self._news.notify()

    # ---- the two threads

    def _copy_all(self) -> None:
        while True:
            path, descriptor = self._shards.get()
            shard = descriptor.shard
            with self._lock:
                gang, newest = self._gang, self._newest.get(shard.rank)
            if gang is None or newest != save_of(shard.key):
                continue
            for node in ring(gang.nodes, gang.me, gang.copies):
                self._try(node, f"a copy of {shard.key}", lambda: self._send(node, path, descriptor))  # noqa: B023

    def _send(self, node: Address, path: Path, descriptor: Descriptor) -> None:
        shard = descriptor.shard
        with self._keeper.pinned(path), path.open("rb") as file, contextlib.closing(connect(node)) as line:
            answer = line.ask({"op": "keep", "descriptor": descriptor.to_json()})
            if not answer.get("have"):
                line.send_file(file, 0, shard.size)
                line.answer()

    def _tell_all(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._committed is not None)
                save, self._committed = self._committed, None
            with self._lock:
                gang = self._gang
            if gang is None or save is None:
                continue
            todo = queue.SimpleQueue[Address]()
            for node in gang.nodes[: gang.me] + gang.nodes[gang.me + 1 :]:
                todo.put(node)
            messengers = [
                threading.Thread(target=self._tell, args=(todo, save), name="tier-messenger", daemon=True)
                for _ in range(min(_MESSENGERS, todo.qsize()))
            ]
            for one in messengers:
                one.start()
            for one in messengers:
                one.join()

    def _tell(self, todo: queue.SimpleQueue[Address], save: Save) -> None:
        def say(node: Address) -> None:
            with contextlib.closing(connect(node)) as line:
                line.ask({"op": "committed", "attempt": save[0], "step": save[1]})

        with contextlib.suppress(queue.Empty):
            while True:
                node = todo.get_nowait()
                self._try(node, "word of a commit", lambda: say(node))  # noqa: B023 - called at once

    def _try(self, node: Address, what: str, call: Callable[[], None]) -> None:
        said: Exception | None = None
        for left in reversed(range(_TRIES)):
            try:
                call()
                with self._lock:
                    self._warned.discard(node.place)
                return
            except FileNotFoundError:
                return  # a newer save has taken its place
            except Declined as error:
                said = error
                break
            except OSError as error:
                said = error
            if left:
                time.sleep(_AGAIN_SECONDS)
        with self._lock:
            first = node.place not in self._warned
            self._warned.add(node.place)
        if first:
            self._warn(f"{node!r} did not take {what}: {getattr(said, 'strerror', None) or said}")

    def _remember(self) -> None:
        memory = _Memory(address=self.address, gang=self._gang)
        with contextlib.suppress(OSError):
            write_whole(self._root / _FILE, json.dumps(encode(memory)).encode(), mode=0o600)


def _open_server(root: Path, keeper: Keeper, host: str) -> tuple[PeerServer, Gang | None]:
    """Where the uploader before listened, if that may be, so that the others still find it."""
    before: _Memory | None = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        before = decode(_Memory, json.loads((root / _FILE).read_bytes()))
    if before is not None and before.address.host == host:
        with contextlib.suppress(OSError, OverflowError):
            server = PeerServer(keeper, host, port=before.address.port, token=before.address.token)
            return server, before.gang
    return PeerServer(keeper, host), None


def open_neighbours(
    root: Path, keeper: Keeper, warn: Callable[[str], None], env: Any = os.environ
) -> Neighbours | None:
    """None, with a word in the log, if this node cannot be reached by others."""
    host = env.get(Env.POD_IP) or "127.0.0.1"
    try:
        return Neighbours(root, keeper, warn, host=host)
    except OSError as error:
        log.warning("no copies on other nodes: cannot listen on %s: %s", host, error.strerror)
        return None


def gang_from(message: dict[str, Any]) -> Gang:
    """Of a "peers" message. Raises ValueError."""
    return decode(Gang, {key: value for key, value in message.items() if key != "op"}, path="peers")


def gang_message(me: int, nodes: Sequence[Address], copies: int) -> dict[str, Any]:
    return {"op": "peers", **encode(Gang(me=me, nodes=list(nodes), copies=copies))}
