"""Where a reader gets the bytes of a shard: this node, another node, the bucket. None of them is trusted more than another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from trainyard.checkpoint.errors import NotFound, ShardInvalid
from trainyard.checkpoint.format.digest import Descriptor
from trainyard.checkpoint.stores import Store
from trainyard_api.checkpoints import Shard


class Source(Protocol):
    """Every call raises NotFound, StoreUnavailable or ShardInvalid if the next source should be asked."""

    name: str
    """"local", "peer" or "store": for people and for counting."""

    def descriptor(self, shard: Shard) -> Descriptor:
        """The one that belongs to `shard` of the commit record, checked against it."""
        ...

    def read_into(self, shard: Shard, begin: int, buffer: memoryview) -> None:
        """Fill the buffer with the file's bytes from `begin` on. May be called by several threads."""
        ...


def parse_descriptor(data: bytes, shard: Shard) -> Descriptor:
    """Raises ShardInvalid."""
    try:
        return Descriptor.from_json(json.loads(data), shard)
    except (ValueError, RecursionError) as error:
        raise ShardInvalid(f"{shard.key}: its descriptor is not JSON") from error


def descriptor_of(key: str) -> str:
    """The key of the descriptor of the shard `key`."""
    return key.removesuffix(".safetensors") + ".json"


class StoreSource:
    """The bucket or directory of the run."""

    name = "store"

    def __init__(self, store: Store) -> None:
        self._store = store

    def descriptor(self, shard: Shard) -> Descriptor:
        return parse_descriptor(self._store.get(descriptor_of(shard.key)), shard)

    def read_into(self, shard: Shard, begin: int, buffer: memoryview) -> None:
        self._store.read_into(shard.key, begin, buffer)


class FolderSource:
    """Files of this node, laid out as in the bucket."""

    name = "local"

    def __init__(self, root: Path) -> None:
        self._root = root

    def descriptor(self, shard: Shard) -> Descriptor:
        try:
            return parse_descriptor((self._root / descriptor_of(shard.key)).read_bytes(), shard)
        except OSError as error:
            raise NotFound(f"{shard.key}: not on this node ({error.strerror})") from error

    def read_into(self, shard: Shard, begin: int, buffer: memoryview) -> None:
        try:
            with (self._root / shard.key).open("rb", buffering=0) as file:
                file.seek(begin)
                done = 0
                while done < len(buffer):
                    count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
                    if not count:
                        raise ShardInvalid(f"{shard.key}: the file on this node is cut off")
                    done += count
        except OSError as error:
            raise NotFound(f"{shard.key}: not on this node ({error.strerror})") from error
