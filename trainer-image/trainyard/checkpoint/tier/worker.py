"""What a worker asks of the fast tier when an attempt begins."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.sources import FolderSource, Source
from trainyard.checkpoint.stores import open_store
from trainyard.checkpoint.tier.keeper import Shelf
from trainyard.checkpoint.tier.known import read_known, write_known
from trainyard.peers import Peers
from trainyard_api.checkpoints import Record
from trainyard_api.contract import Env

log = logging.getLogger("trainyard.checkpoint")


class Tier(Protocol):
    """Nothing of it raises."""

    def known_records(self) -> list[Record] | None:
        """Rank 0: the whole log, if this node is sure to know it; None: ask the bucket."""
        ...

    def sources(self, record: Record) -> list[Source]:
        """Collective: where shards of `record` may be had, the fastest first, the bucket not among them."""
        ...

    def announce(self, records: Collection[Record] = ()) -> None:
        """Collective, once the attempt has begun: introduce the nodes' uploaders to each other. Rank 0 may say what the log
        is now."""
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
    if not env.get(Env.RUNTIME_DIR):
        if peers.rank == 0:
            log.warning(
                "checkpoint.local and .copies have no effect here: %s names no folder that outlives the process",
                Env.RUNTIME_DIR,
            )
        return _NoTier()
    return NodeTier(config, peers, staging, env.get(Env.UPLOADER_SOCKET, ""))


class NodeTier:
    """Of a node whose staging folder outlives its workers."""

    def __init__(self, config: CheckpointConfig, peers: Peers, staging: Path, socket: str) -> None:
        self._config = config
        self._peers = peers
        self._root = staging
        self._socket = socket

    def known_records(self) -> list[Record] | None:
        config = self._config
        return read_known(self._root, open_store(config).uri, config.run_id, config.attempt)

    def sources(self, record: Record) -> list[Source]:
        save = (record.attempt, record.step)
        return [
            FolderSource(shelf.root)
            for shelf in (Shelf(self._root), Shelf(self._root / "copies"))
            if shelf.shards(save)
        ]

    def announce(self, records: Collection[Record] = ()) -> None:
        if self._peers.rank == 0 and records:
            try:
                write_known(self._root, open_store(self._config).uri, self._config.run_id, records)
            except OSError as error:
                log.warning("%s: %s", self._root, error)
