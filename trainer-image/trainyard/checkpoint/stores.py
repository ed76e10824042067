"""The seam to where checkpoints lie: a handful of verbs on keys relative to one run's prefix."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import StoreConfigError, StoreError
from trainyard_api.contract import Env

GET_LIMIT = 64 << 20
"""Bytes: what is fetched whole is a record or a descriptor, never a shard."""
_PROBE = "probe/conditional"


@dataclass(frozen=True, slots=True, order=True)
class Listed:
    key: str
    size: int
    """Bytes."""
    modified: float
    """Unix seconds, by the store's clock."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """An upload that is not finished: still under way, or of a process that died."""

    key: str
    """What it would become."""
    upload_id: str
    begun: float
    """Unix seconds, by the store's clock."""


class Store(Protocol):
    """Every call raises StoreUnavailable (try again), StoreConfigError (do not) or NotFound.

    Keys are text as `trainyard_api.checkpoints` makes them. May be used by several threads at once.
    """

    @property
    def uri(self) -> str:
        """Of the run's prefix, without a slash at the end."""
        ...

    @property
    def conditional(self) -> bool:
        """Whether `create` holds: a server may not know If-None-Match. Asks it, once, by an object under "probe/"."""
        ...

    def get(self, key: str, limit: int = GET_LIMIT) -> bytes:
        """The whole of a small object. Raises ShardInvalid if it is larger than `limit` bytes."""
        ...

    def read(self, key: str) -> Iterator[bytes]:
        """The content in pieces."""
        ...

    def read_into(self, key: str, begin: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from `begin` on.

        Raises StoreUnavailable if the connection broke, ShardInvalid if the object itself ends earlier.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Appears whole or not at all; replaces what was there."""
        ...

    def put_parts(self, key: str, path: Path, part: int) -> list[str]:
        """Like put, for a file, in parts of `part` bytes: SHA-256 of each (lower-case hex), which the server has checked.

        Several parts are under way at a time; memory is that of a few of them. Raises OSError if the file cannot be read.
        """
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Whether this call created the key; False when it exists. Atomic among any number of writers."""
        ...

    def list(self, prefix: str) -> list[str]:
        """All keys that begin with `prefix`, sorted; complete at the time of the call."""
        ...

    def listing(self, prefix: str) -> Sequence[Listed]:
        """As `list`, with sizes and times."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Deleting what is not there is no error."""
        ...

    def leftovers(self, prefix: str = "") -> Sequence[Leftover]:
        """Unfinished uploads whose key begins with `prefix`."""
        ...

    def abort(self, leftover: Leftover) -> None:
        """Free what it takes. No error if it is gone."""
        ...


class ConditionsNotOffered(StoreError):
    """The server says itself that it does not know If-None-Match."""


def probe_conditional(store: Store) -> bool:
    """Whether the second of two creates of the same key is refused."""
    try:
        return not store.create(_PROBE, b"{}") or not store.create(_PROBE, b"{}")
    except ConditionsNotOffered:
        return False


def open_store(config: CheckpointConfig) -> Store:
    """The store of `config.run_id`. Nothing is asked of the server yet."""
    if config.uri.startswith("s3://"):
        from trainyard.checkpoint.store_s3 import S3Store

        return S3Store(config.uri, config.run_id, endpoint=config.endpoint, region=config.region)
    from trainyard.checkpoint.store_local import LocalStore

    return LocalStore(config.uri, config.run_id)


def open_parent(uri: str, *, endpoint: str | None = None, region: str | None = None) -> tuple[Store, str]:
    """(a store, the key in it) of the single object `s3://bucket/some/key`; by default with the server of this
    TrainingRun, else the one that AWS_ENDPOINT_URL names. Raises StoreConfigError if `uri` names no object."""
    from trainyard.checkpoint.store_s3 import S3Store

    folder, _, key = uri.removeprefix("s3://").rpartition("/")
    if not folder or not key:
        raise StoreConfigError(f"{uri}: an object is s3://bucket/key")
    store = S3Store(
        f"s3://{folder}", "", endpoint=endpoint or os.environ.get(Env.CHECKPOINT_ENDPOINT) or None,
        region=region or os.environ.get(Env.CHECKPOINT_REGION) or None,
    )  # fmt: skip
    return store, key


def warm_up() -> None:
    """Does once, before processes are forked, what is the same in all of them. No request is made.

    Raises ValueError for an environment that does not describe a store.
    """
    config = CheckpointConfig.from_env()
    if config is not None:
        open_store(config)
