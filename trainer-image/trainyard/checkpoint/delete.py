"""`python -m trainyard.checkpoint.delete`: deletes all that a run has below its checkpoint URI.

For the pod that the operator starts when a TrainingRun with `checkpoint.deletionPolicy: Delete` is deleted; by hand it
needs the same environment (TRAINYARD_CHECKPOINT_URI, TRAINYARD_RUN_UID, credentials). It may be killed at any moment
and run again: the commit log goes last, newest record last of all, so that what is left of a run can be recognised and a
process of an older attempt still meets the newest fence.

Exit codes: 0 nothing is left; 78 somebody has to change something first; 1 another try may help. The last words are
one JSON object {"outcome": "deleted" | "failed", "message"} in the termination message, and the message on stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import CheckpointError, NotFound, StoreError, StoreUnavailable, exit_code
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.stores import Listed, Store, open_store
from trainyard_api.contract import TERMINATION_LOG, Env, ExitCode

BATCH = 1000
"""Keys in one call: as many as one DeleteObjects takes."""
LOG = "commits/"
SECONDS = 570.0
PATIENCE = 60.0
"""Seconds for which one call is repeated while the store cannot be reached."""

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deleted:
    """What is gone."""

    objects: int = 0
    bytes: int = 0
    uploads: int = 0
    """Unfinished ones."""
    trouble: str = ""
    """Why unfinished uploads may be left; they are no objects, and a bucket's lifecycle rule can end them."""

    def __str__(self) -> str:
        text = f"{self.objects} objects, {self.bytes} bytes"
        text += f", {self.uploads} unfinished uploads" if self.uploads else ""
        return text + (f"; unfinished uploads may be left: {self.trouble}" if self.trouble else "")


class Unfinished(CheckpointError):
    """The time is over; what is left is for the next try."""


def delete_all(store: Store, *, seconds: float, clock: Callable[[], float] = time.monotonic) -> Deleted:
    """Deletes every object and every unfinished upload of the store's prefix.

    Raises Unfinished after `seconds`, StoreUnavailable when the store cannot be reached for PATIENCE, and other StoreErrors.
    """
    work = _Work(store, clock() + seconds, clock)
    while True:
        done = work.uploads(work.done)
        found = work.call(lambda: store.listing(""))
        work.left = len(found)
        if not found:
            return done
        work.delete([item for item in found if not item.key.startswith(LOG)])
        work.delete(sorted(item for item in found if item.key.startswith(LOG)))
        # Once more from the start: whoever wrote while we read is found by the next listing.


class _Work:
    """One deletion: what is done, and until when it may take."""

    def __init__(self, store: Store, deadline: float, clock: Callable[[], float]) -> None:
        self._store = store
        self._deadline = deadline
        self._clock = clock
        self.done = Deleted()
        self.left = 0

    def call(self, request: Callable[[], T]) -> T:
        """One request, repeated while that may help and there is time."""
        remaining = self._deadline - self._clock()
        if remaining <= 0:
            raise Unfinished(f"the time is over: {self.done} are deleted, {self.left} objects are left")
        return with_retries(request, seconds=min(PATIENCE, remaining))

    def delete(self, items: Iterable[Listed]) -> None:
        """These objects, in this order."""
        items = list(items)
        for begin in range(0, len(items), BATCH):
            batch = items[begin : begin + BATCH]
            self.call(partial(self._store.delete, [item.key for item in batch]))
            self.left -= len(batch)
            self.done = replace(
                self.done,
                objects=self.done.objects + len(batch),
                bytes=self.done.bytes + sum(item.size for item in batch),
            )
            log.info("%s: %s deleted", self._store.uri, self.done)

    def uploads(self, done: Deleted) -> Deleted:
        """Ends unfinished uploads: they cost money and are in no listing. Not every server and not everybody's
        rights know them, and that keeps nobody from deleting the objects."""
        try:
            for leftover in self.call(self._store.leftovers):
                with suppress(NotFound):
                    self.call(partial(self._store.abort, leftover))
                done = replace(done, uploads=done.uploads + 1)
        except StoreUnavailable:
            raise
        except StoreError as error:
            done = replace(done, trouble=str(error))
        self.done = done
        return done


def main(
    argv: list[str] | None = None, env: Mapping[str, str] = os.environ, told: Path = Path(TERMINATION_LOG)
) -> int:
    """Returns the exit code; `told` is where the last words go."""
    parser = argparse.ArgumentParser(
        prog="python -m trainyard.checkpoint.delete", description="Delete a run's checkpoints."
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time it may take [%(default)g]")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = CheckpointConfig.from_env(env)
        if config is None or not config.run:  # without a UID the whole URI would be meant
            raise ValueError(f"{Env.CHECKPOINT_URI} and {Env.RUN_UID} must be set")
        done = delete_all(open_store(config), seconds=options.seconds)
        _remove_folder(config)
    except ValueError as error:
        return _say(told, "failed", str(error), int(ExitCode.CONFIG))
    except CheckpointError as error:
        return _say(told, "failed", str(error), exit_code(error))
    return _say(told, "deleted", str(done), 0)


def _remove_folder(config: CheckpointConfig) -> None:
    """A prefix is gone with its last object; a directory is not."""
    if config.uri.startswith("file://") and config.run:
        folder = Path(unquote(urlsplit(config.uri).path)) / config.run
        with suppress(OSError):  # not empty: somebody's own files, which no store lists
            for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
                path.rmdir()
            folder.rmdir()


def _say(told: Path, outcome: str, message: str, code: int) -> int:
    print(message, file=sys.stderr)
    with suppress(OSError):  # by hand there is none
        if told.exists():
            told.write_text(json.dumps({"outcome": outcome, "message": message[:1000]}))
    return code


if __name__ == "__main__":
    sys.exit(main())
