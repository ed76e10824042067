"""The checkpoints of a TrainingRun as single files: the way from where a run saved to everything else here."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainyard.export.errors import ExportError

_COMMIT = re.compile(r"/commits/(\d{8})\.json$")
_log = logging.getLogger("trainyard")


def checkpoint_of_run(
    run: str, path: str | os.PathLike[str], *, endpoint: str | None = None, region: str | None = None
) -> int:
    """Write the newest checkpoint of a run into one `.ckpt` file, which Lightning reads too. Returns its step.

    `run` is where the run saves, `<spec.checkpoint.uri>/<the run's UID>` (s3:// or file:///), or one of its commits, as
    the run's status names them. The run may go on meanwhile: nothing is written there.
    Raises ExportError for what is no such place; NoUsableCheckpoint, StoreConfigError, StoreUnavailable.
    """
    from trainyard.checkpoint.config import CheckpointConfig
    from trainyard.checkpoint.resume import newest
    from trainyard.checkpoint.stores import open_store
    from trainyard.trainer import ckpt_file

    commit = _COMMIT.search(run)
    folder, _, name = _COMMIT.sub("", run).rstrip("/").rpartition("/")
    try:
        config = CheckpointConfig(uri=folder, run=name, endpoint=endpoint or _endpoint(), region=region)
    except ValueError as error:
        raise ExportError(f"{run!r} is not where a run saves, s3://bucket/prefix/<uid>: {error}") from error
    record, state, passed_over = newest(open_store(config), config.run_id, int(commit[1]) if commit else None)
    for reason in passed_over:
        _log.warning("a newer checkpoint was passed over: %s", reason)
    ckpt_file.write(state.main, path)
    return record.step


@contextlib.contextmanager
def as_file(checkpoint: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """`checkpoint` if it is a file's place, or else a temporary file with the newest checkpoint of the run that it is."""
    if not is_run(checkpoint):
        yield checkpoint
        return
    text = os.fspath(checkpoint)
    with tempfile.TemporaryDirectory(prefix="trainyard-") as folder:
        path = Path(folder) / "run.ckpt"
        checkpoint_of_run(text if "://" in text else Path(text).absolute().as_uri(), path)
        yield path


def is_run(checkpoint: str | os.PathLike[str]) -> bool:
    """A commit, a folder with commits in it, or an s3:// prefix: files there have a suffix."""
    text = os.fspath(checkpoint)
    if _COMMIT.search(text):
        return True
    if text.startswith("s3://"):
        return not Path(text).suffix
    return (Path(text.removeprefix("file://")) / "commits").is_dir()


def _endpoint() -> str | None:
    from trainyard_api.contract import Env

    return os.environ.get(Env.CHECKPOINT_ENDPOINT) or None
