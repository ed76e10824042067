"""What a worker asks of the fast tier when an attempt begins."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.messages import from_line, to_line
from trainyard.checkpoint.sources import FolderSource, Source
from trainyard.checkpoint.stores import open_store
from trainyard.checkpoint.tier.copies import gang_message
from trainyard.checkpoint.tier.keeper import Shelf
from trainyard.checkpoint.tier.known import read_known, write_known
from trainyard.checkpoint.tier.peer import PeerSource
from trainyard.checkpoint.tier.wire import Address
from trainyard.peers import Peers
from trainyard_api.checkpoints import Record, shard_key
from trainyard_api.contract import Env
from trainyard_api.serde import decode, encode

log = logging.getLogger("trainyard.checkpoint")

_ANSWER_SECONDS = 2.0
_MOST_ANSWER = 64 << 10


class Tier(Protocol):
    """Nothing of it raises, but for what the collectives themselves raise."""

    def known_records(self) -> list[Record] | None:
        """Rank 0: the whole log, if this node is sure to know it; None: ask the bucket."""
        ...

    def sources(self, record: Record) -> list[Source]:
        """Collective: where shards of `record` may be had, the fastest first, the bucket not among them."""
        ...

    def announce(self, records: Collection[Record] = ()) -> None:
        """Collective, once the attempt has begun: introduce the nodes' uploaders to each other. Rank 0 may say what the log
        is now, its own fence included: then an attempt that ends before its first commit costs the next one no listing."""
        ...


class _NoTier:
    def known_records(self) -> list[Record] | None:
        return None

    def sources(self, record: Record) -> list[Source]:
        return []

    def announce(self, records: Collection[Record] = ()) -> None:
        pass


def open_tier(
    config: CheckpointConfig, peers: Peers, staging: Path, env: Mapping[str, str] = os.environ
) -> Tier:
    """Cheap, and not collective. All ranks must have the same `config`."""
    if not (config.local or config.copies):
        return _NoTier()
    if not (env.get(Env.RUNTIME_DIR) and env.get(Env.UPLOADER_SOCKET)):
        if peers.rank == 0:
            log.warning(
                "checkpoint.local and .copies have no effect here: no agent keeps a folder beyond the life of its workers"
            )
        return _NoTier()
    return NodeTier(config, peers, staging, env[Env.UPLOADER_SOCKET])


class NodeTier:
    """Of a pod, where staging folder and uploader outlive the workers."""

    def __init__(self, config: CheckpointConfig, peers: Peers, staging: Path, socket_path: str) -> None:
        self._config = config
        self._peers = peers
        self._root = staging
        self._socket = socket_path

    def known_records(self) -> list[Record] | None:
        config = self._config
        return read_known(self._root, open_store(config).uri, config.run_id, config.attempt)

    def sources(self, record: Record) -> list[Source]:
        shelves = [Shelf(self._root), Shelf(self._root / "copies")]
        save = (record.attempt, record.step)
        here = {key for shelf in shelves for key in _held(shelf, save)}
        found: list[Source] = [FolderSource(shelf.root) for shelf in shelves if _held(shelf, save)]
        mine = self._address()
        told = {"address": encode(mine) if mine else None, "ranks": _ranks(record, here)}
        nodes = _nodes(self._peers.gather(told))
        places = [address.place for address, _ in nodes]
        first = places.index(mine.place) + 1 if mine and mine.place in places else 0
        for address, ranks in [*nodes[first:], *nodes[:first]]:  # not all begin with the same one
            if ranks and (mine is None or address.place != mine.place):
                found.append(PeerSource(address, [_key(record, rank) for rank in ranks]))
        return found

    def announce(self, records: Collection[Record] = ()) -> None:
        if self._peers.rank == 0 and records:
            try:
                write_known(self._root, open_store(self._config).uri, self._config.run_id, records)
            except OSError as error:
                log.warning("%s: %s", self._root, error)
        mine = self._address()
        nodes = [
            address for address, _ in _nodes(self._peers.gather({"address": encode(mine) if mine else None}))
        ]
        if mine is None:
            return
        me = [address.place for address in nodes].index(mine.place)
        self._ask(gang_message(me, nodes, self._config.copies))

    def _address(self) -> Address | None:
        """Of this node's uploader, if it has one that others can reach."""
        try:
            found = self._ask({"op": "address"}).get("address")
            return decode(Address, found) if found is not None else None
        except ValueError:
            return None

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer; empty if there is none within two seconds."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_ANSWER_SECONDS)
                connection.connect(self._socket)
                connection.sendall(to_line(message))
                with connection.makefile("rb") as lines:
                    return from_line(lines.readline(_MOST_ANSWER))
        except (OSError, ValueError) as error:
            log.warning("the uploader does not say how to reach other nodes: %s", error)
            return {}


def _held(shelf: Shelf, save: tuple[int, int]) -> list[str]:
    try:
        return shelf.shards(save)
    except OSError:
        return []


def _key(record: Record, rank: int) -> str:
    return shard_key(record.step, record.attempt, rank, record.world_size)


def _ranks(record: Record, keys: Collection[str]) -> list[int]:
    return [rank for rank in range(record.world_size) if _key(record, rank) in keys]


def _nodes(told: list[dict[str, Any]]) -> list[tuple[Address, list[int]]]:
    """What the ranks said, once for each node, in the order of the ranks."""
    found: dict[tuple[str, int], tuple[Address, list[int]]] = {}
    for one in told:
        if one["address"] is not None:
            address = decode(Address, one["address"])
            found.setdefault(address.place, (address, list(one.get("ranks", []))))
    return list(found.values())
