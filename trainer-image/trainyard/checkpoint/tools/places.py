"""From what somebody types to the runs that lie there."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import CheckpointConfigError, NoUsableCheckpoint
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.stores import Listed, Store, open_store
from trainyard_api.checkpoints import Record, commits_newest_first
from trainyard_api.contract import Env

PATIENCE_SECONDS = 10.0
"""How long a server may be unreachable."""
_COMMIT = re.compile(r"/commits/(\d{8})[^/]*\.json$")
_RECORD = re.compile(r"(?P<run>[^/]+)/commits/\d{8}[^/]*\.json")


@dataclass(frozen=True)
class Run:
    """One run's checkpoints. All that is read is read once."""

    store: Store
    name: str
    seq: int | None = None
    """The commit that the place named, if it did."""
    endpoint: str | None = None
    region: str | None = None

    @property
    def uri(self) -> str:
        return self.store.uri

    @cached_property
    def log(self) -> CommitLog:
        """Read. Raises StoreError."""
        log = CommitLog(self.store, self.name)
        with_retries(log.refresh, seconds=PATIENCE_SECONDS)
        return log

    @property
    def records(self) -> list[Record]:
        return self.log.records

    @cached_property
    def objects(self) -> dict[str, Listed]:
        """What lies under data/, by key."""
        listed = with_retries(lambda: self.store.listing("data/"), seconds=PATIENCE_SECONDS)
        return {each.key: each for each in listed}

    def commit(self, step: int | None = None, seq: int | None = None) -> Record:
        """The one that is named, else the newest. Raises NoUsableCheckpoint."""
        seq = self.seq if seq is None else seq
        commits = commits_newest_first(self.records)
        found = [c for c in commits if (seq is None or c.seq == seq) and (step is None or c.step == step)]
        if found:
            return found[0]
        if step is not None:
            steps = ", ".join(str(c.step) for c in commits) or "none"
            raise NoUsableCheckpoint(f"{self.uri}: no checkpoint of step {step}; there are: {steps}")
        unreadable = [text for _, text in sorted(self.log.unreadable.items(), reverse=True)]
        which = "no checkpoint" if seq is None else f"no checkpoint commits/{seq:08d}"
        raise NoUsableCheckpoint("; ".join([f"{self.uri}: {which}", *unreadable]))


def open_run(place: str, *, endpoint: str | None = None, region: str | None = None) -> Run:
    """`s3://bucket/prefix/<run>`, `file:///folder/<run>`, a path, or one of a run's commits.

    Raises CheckpointConfigError for what is no such place; NoUsableCheckpoint where there is no run, with the runs that
    are there.
    """
    run = _at(place, endpoint, region)
    if run is not None and _has_records(run):
        return run
    inside = runs_in(place, endpoint=endpoint, region=region)
    if not inside:
        raise NoUsableCheckpoint(f"{place}: no checkpoints: there is no commits/ folder, and no run below it")
    names = ", ".join(each.name for each in inside[:5]) + (", ..." if len(inside) > 5 else "")
    raise NoUsableCheckpoint(
        f"{place} is not a run, but has these: {names}; name one: {place.rstrip('/')}/{inside[0].name}"
    )


def open_runs(place: str, *, endpoint: str | None = None, region: str | None = None) -> list[Run]:
    """The run that `place` is, or those right below it. Raises as `open_run`."""
    run = _at(place, endpoint, region)
    if run is not None and _has_records(run):
        return [run]
    inside = runs_in(place, endpoint=endpoint, region=region)
    if not inside:
        raise NoUsableCheckpoint(f"{place}: no checkpoints: there is no commits/ folder, and no run below it")
    return inside


def runs_in(place: str, *, endpoint: str | None = None, region: str | None = None) -> list[Run]:
    """The runs right below `place`, by name."""
    uri = _uri(place)
    parent = _parent(uri, endpoint, region)
    keys = with_retries(lambda: parent.list(""), seconds=PATIENCE_SECONDS)
    names = sorted({found["run"] for key in keys if (found := _RECORD.fullmatch(key))})
    return [_run(uri, name, endpoint, region) for name in names]


def _at(place: str, endpoint: str | None, region: str | None) -> Run | None:
    """None for a bucket, which is no run."""
    uri = _uri(place)
    commit = _COMMIT.search(uri)
    folder, _, name = _COMMIT.sub("", uri).rpartition("/")
    if not name or folder in ("s3:/", "file:", "file://"):
        return None
    return _run(folder, name, endpoint, region, int(commit[1]) if commit else None)


def _uri(place: str) -> str:
    """Raises CheckpointConfigError."""
    if "://" not in place:
        return Path(place).expanduser().absolute().as_uri().rstrip("/")
    if not re.match(r"s3://[^/]|file:///", place):
        raise CheckpointConfigError(
            f"{place!r} is none of s3://bucket/prefix, file:///absolute/path and a path"
        )
    return place.rstrip("/")


def _run(folder: str, name: str, endpoint: str | None, region: str | None, seq: int | None = None) -> Run:
    config = _config(folder, name, endpoint, region)
    return Run(open_store(config), name, seq, config.endpoint, config.region)


def _config(folder: str, name: str, endpoint: str | None, region: str | None) -> CheckpointConfig:
    try:
        return CheckpointConfig(
            uri=folder, run=name, endpoint=endpoint or os.environ.get(Env.CHECKPOINT_ENDPOINT) or None,
            region=region or os.environ.get(Env.CHECKPOINT_REGION) or None,
        )  # fmt: skip
    except ValueError as error:
        raise CheckpointConfigError(f"{folder}/{name} is not where a run saves: {error}") from error


def _parent(uri: str, endpoint: str | None, region: str | None) -> Store:
    if uri.startswith("s3://"):
        from trainyard.checkpoint.store_s3 import S3Store

        config = _config(uri, "any", endpoint, region)
        return S3Store(uri, "", endpoint=config.endpoint, region=config.region)
    from trainyard.checkpoint.store_local import LocalStore

    return LocalStore(uri, "")


def _has_records(run: Run) -> bool:
    return bool(with_retries(lambda: run.store.list("commits/"), seconds=PATIENCE_SECONDS))
