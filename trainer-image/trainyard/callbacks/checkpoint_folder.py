"""The folder of one ModelCheckpoint: which of its files are whose, and which may go.

A resume goes back in time: the folder then holds files of a future that is trained again. Such a file is replaced when its
time comes, where a file of another run makes the name taken. And what the newest committed state still names is not
removed before a newer state is committed: a run that is killed in between finds it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


@dataclass(slots=True)
class Folder:
    """Paths are whole ones. Only rank 0's counts, and is in checkpoints."""

    path: str | None = None
    others: set[str] = field(default_factory=set)
    """Files that were there before this run, and are not of it."""
    own: set[str] = field(default_factory=set)
    """Written by this run, and not removed."""
    retired: dict[str, int] = field(default_factory=dict)
    """To be removed, once a state of this step or a later one is committed."""

    def taken(self, path: str) -> bool:
        return path in self.others or path in self.own

    def wrote(self, path: str) -> None:
        self.own.add(path)
        self.others.discard(path)
        self.retired.pop(path, None)

    def retire(self, path: str, step: int) -> None:
        """Files elsewhere stay: they are of another run's folder."""
        if path in self.own and inside(self.path, path):
            self.retired[path] = step
        self.own.discard(path)

    def sweep(self, committed: int | None) -> None:
        """Remove what was retired up to step `committed`; everything if None."""
        for path, step in list(self.retired.items()):
            if committed is not None and step > committed:
                continue
            try:
                remove(path)
            except (OSError, CheckpointError) as error:
                # It costs space, but the training does not hang on it; it is tried again at the next sweep.
                _log.warning("the checkpoint %s cannot be removed: %s", path, error)
                continue
            del self.retired[path]

    def adopt(self, paths: set[str]) -> None:
        """They are of this run after all."""
        self.own |= paths
        self.others -= paths

    def state(self) -> dict[str, Any]:
        def names(paths: Iterable[str]) -> list[str]:
            return sorted(relative(self.path, path) for path in paths)

        return {
            "others": names(self.others),
            "own": names(self.own),
            "retired": {relative(self.path, path): step for path, step in self.retired.items()},
        }

    def load(self, state: dict[str, Any], locate: Callable[[str], str]) -> None:
        self.others = {locate(name) for name in state["others"]}
        self.own = {locate(name) for name in state["own"]}
        self.retired = {locate(name): int(step) for name, step in state["retired"].items()}


def join(folder: str | None, name: str) -> str:
    if folder is None:
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def inside(folder: str | None, path: str) -> bool:
    return folder is not None and path.startswith(f"{folder.rstrip('/')}/")


def relative(folder: str | None, path: str) -> str:
    """`path` as seen from `folder`; unchanged if it is not inside."""
    return path.removeprefix(f"{(folder or '').rstrip('/')}/") if inside(folder, path) else path


def is_remote(path: str) -> bool:
    return path.startswith("s3://")


def whole(path: str | os.PathLike[str]) -> str:
    """Links resolved and `~` expanded; s3:// stays. Raises MisconfigurationException for another scheme than file://."""
    from trainyard.trainer import ckpt_file

    text = os.fspath(path)
    return text.rstrip("/") if is_remote(text) else str(ckpt_file.local_path(text).resolve())


def listing(folder: str, extension: str) -> set[str]:
    """Whole paths of all checkpoints in `folder` and below. Raises OSError, CheckpointError."""
    if not is_remote(folder):
        return {str(path) for path in Path(folder).rglob(f"*{extension}") if not path.name.startswith(".")}
    from trainyard.checkpoint.stores import open_parent

    store, _ = open_parent(f"{folder}/x")
    return {f"{folder}/{key}" for key in store.list("") if key.endswith(extension)}


def locate(path: str, before: str | None, now: str | None) -> str:
    """The whole path of what was saved when the folder was `before`; it may have moved to `now`. Raises CheckpointError."""
    name = relative(before, path)
    if is_remote(name) or Path(name).is_absolute():
        return name
    here, there = join(now, name), join(before, name)
    if now is None or (before not in (None, now) and not exists(here) and exists(there)):
        return there
    return here


def missing(paths: Iterable[str]) -> set[str]:
    """Those of `paths` where there is no file. Raises CheckpointError when a bucket cannot be asked."""
    return {path for path in paths if not exists(path)}


def exists(path: str) -> bool:
    """Raises CheckpointError when a bucket cannot be asked."""
    from trainyard.trainer import ckpt_file

    return ckpt_file.exists(path)


def remove(path: str) -> None:
    """No error if it is not there. Raises OSError, CheckpointError."""
    from trainyard.trainer import ckpt_file

    ckpt_file.remove(path)


def link(target: str, path: str) -> None:
    """Make `path` a relative link to `target`, at once: it never is missing in between. Raises OSError."""
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, place.parent))
    temporary.replace(place)


def committed_step(trainer: Trainer) -> int | None:
    """Of the newest state that a resume would take by itself; None when there is none to wait for."""
    checkpointer = trainer.checkpointer
    return None if checkpointer is None else checkpointer.committed_step
