"""The seam to where checkpoints lie: a handful of verbs on keys relative to one run's prefix."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import StoreConfigError
from trainyard_api.contract import Env


class Store(Protocol):
    """Every call raises StoreUnavailable (try again), StoreConfigError (do not) or NotFound."""

    @property
    def uri(self) -> str:
        """Of the run's prefix, without a slash at the end."""
        ...

    def get(self, key: str) -> bytes: ...

    def read(self, key: str) -> Iterator[bytes]:
        """The content in pieces."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Appears whole or not at all; replaces what was there."""
        ...

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Like put, for a file whose content has the hexadecimal `sha256`."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Whether this call created the key; False when it exists. Atomic among any number of writers."""
        ...

    def list(self, prefix: str) -> list[str]:
        """All keys that begin with `prefix`, sorted; complete at the time of the call."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Deleting what is not there is no error."""
        ...


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
