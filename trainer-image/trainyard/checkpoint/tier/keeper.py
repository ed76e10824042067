"""The files of the node-local tier: what is kept after its upload, what may be overwritten, what goes.

    <root>/data/step-.../a.../shard-....safetensors   staged by a worker; with a descriptor `.json` beside it: uploaded, kept
    <root>/copies/data/...                            the same of other nodes
    <root>/free/*.safetensors                         to be overwritten by the next save: its pages are warm

Everything is found again by looking, so that an uploader that was killed loses nothing. A kept file is worth nothing
until a reader has verified it; so no fsync, and no harm if it is overwritten while it is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from trainyard.checkpoint.format.digest import Descriptor
from trainyard.checkpoint.sources import descriptor_of
from trainyard.checkpoint.tier.rules import Save, surplus
from trainyard_api.checkpoints import SAFE_KEY

log = logging.getLogger("trainyard.checkpoint")

_FOLDER = re.compile(r"data/step-(\d{12})/a(\d{6})")


class Shelf:
    """Shards under one folder, laid out as in the bucket."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """Raises ValueError for what is not the key of a shard: others name keys, too."""
        if not SAFE_KEY.fullmatch(key):
            raise ValueError(f"{key[:100]!r} is not the key of a shard")
        return self.root / key

    def put(self, descriptor: Descriptor) -> None:
        """From now on the file beside it counts. Raises OSError."""
        path = self.path(descriptor.shard.key)
        write_whole(path.with_suffix(".json"), json.dumps(descriptor.to_json()).encode())

    def holds(self, key: str) -> bool:
        return (self.root / key).is_file() and (self.root / descriptor_of(key)).is_file()

    def shards(self, save: Save | None = None) -> list[str]:
        """Keys of those that count, of one save or of all."""
        found = [
            f"{folder.relative_to(self.root).as_posix()}/{path.name}"
            for at, folder in self._folders()
            if save in (None, at)
            for path in folder.glob("shard-*.safetensors")
        ]
        return sorted(key for key in found if SAFE_KEY.fullmatch(key) and self.holds(key))

    def saves(self) -> set[Save]:
        """Those of which at least one shard is here."""
        return {save for save, folder in self._folders() if any(folder.glob("shard-*.json"))}

    def take_out(self, key: str) -> Path:
        """It does not count any more; where its file is."""
        (self.root / descriptor_of(key)).unlink(missing_ok=True)
        return self.root / key

    def sweep(self, attempt: int, busy: Collection[Path]) -> None:
        """Delete what older attempts than `attempt` left unfinished, and folders that are empty."""
        for (made, _), folder in list(self._folders()):
            for path in list(folder.iterdir()) if made < attempt else []:
                whole = path.with_suffix(".safetensors").is_file() and path.with_suffix(".json").is_file()
                if path not in busy and (path.suffix == ".tmp" or not whole):
                    path.unlink(missing_ok=True)
            self.tidy(folder)

    def tidy(self, folder: Path) -> None:
        """Removes it and its parents while they are empty."""
        with contextlib.suppress(OSError):
            for empty in (folder, folder.parent):
                empty.rmdir()

    def _folders(self) -> Iterator[tuple[Save, Path]]:
        for folder in self.root.glob("data/step-*/a*"):
            match = _FOLDER.fullmatch(folder.relative_to(self.root).as_posix())
            if match and folder.is_dir():
                yield (int(match[2]), int(match[1])), folder


class Keeper:
    """What becomes of the files of one node. Never raises: the bucket is the truth, and this only makes things faster."""

    def __init__(self, root: Path, *, keep: bool, warn: Callable[[str], None] = log.warning) -> None:
        self.own = Shelf(root)
        self.copies = Shelf(root / "copies")
        self._free = root / "free"
        self._warn = warn
        self._lock = threading.RLock()
        self._committed: Save | None = None
        self._in_flight: set[tuple[Save, int]] = set()
        """With the rank. Of our own, and of copies that are coming."""
        self._coming: set[tuple[Save, int]] = set()
        self._pinned: dict[Path, int] = {}
        self._ranks: set[int] = set()
        self._attempt = 0
        self.on = keep
        """Whether uploaded shards are kept."""
        self._take_copies = True
        for path in [*self.copies.root.rglob("*.tmp"), *root.glob("*.tmp")]:
            path.unlink(missing_ok=True)
        if not keep:
            self._clear()

    @property
    def committed(self) -> Save | None:
        with self._lock:
            return self._committed

    def began(self, save: Save, rank: int, path: Path, busy: Collection[Path]) -> None:
        """A shard of `save` was staged at `path`; `busy` are all files that are being uploaded."""
        with self._lock, self._careful("tidying up"):
            path.with_suffix(".json").unlink(missing_ok=True)  # was of another file of that name
            if save[0] > self._attempt:
                self._attempt, self._ranks = save[0], set()
                self.own.sweep(save[0], busy)
            self._ranks.add(rank)
            self._in_flight.add((save, rank))
            self._let_go()

    def uploaded(self, path: Path, descriptor: Descriptor) -> bool:
        """Keep the file of a shard that is in the bucket, if there is room for the next save beside it; whether it is."""
        with self._lock, self._careful("keeping a shard"):
            if not self.on or not path.is_file():
                return False
            if not self._room(path):
                self.no_copies(
                    f"{self.own.root} has no room for copies of other nodes beside two saves of its own"
                )
            if not self._room(path):
                self.off(
                    f"{self.own.root} has no room for two saves of {len(self._ranks)} x "
                    f"{descriptor.shard.size / 2**20:.1f} MiB: the newest checkpoint is not kept on this node any more"
                )
                return False
            self.own.put(descriptor)
            return True
        return False

    def ended(self, save: Save, path: Path, rank: int, *, committed: bool) -> None:
        """Nothing more is going to happen to this shard."""
        with self._lock, self._careful("letting go of a shard"):
            self._in_flight.discard((save, rank))
            if committed:
                self._committed = max(self._committed or save, save)
            if not path.with_suffix(".json").is_file():
                self._retire(path)
            self._let_go()

    def heard(self, save: Save) -> None:
        """Another node says that `save` was committed."""
        with self._lock, self._careful("letting go of a shard"):
            self._committed = max(self._committed or save, save)
            self._let_go()

    def staging_failed(self) -> None:
        """A worker could not stage a shard. If that was for want of room, what is kept makes some."""
        with self._lock, self._careful("making room"):
            kept = [self.own.path(key) for key in self.own.shards()]
            if self.on and kept and not all(self._room(path) for path in kept):
                self.off(f"{self.own.root} is full: checkpoints are not kept on this node any more")

    def off(self, why: str) -> None:
        """Until the uploader is started again. Says so, once."""
        with self._lock:
            if self.on:
                self.on = False
                self._warn(why)
            self._clear()

    @contextlib.contextmanager
    def pinned(self, path: Path) -> Iterator[None]:
        """The file is read inside: it is not given to a worker meanwhile, at most deleted."""
        with self._lock:
            self._pinned[path] = self._pinned.get(path, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._pinned[path] -= 1
                if not self._pinned[path]:
                    del self._pinned[path]

    @contextlib.contextmanager
    def receiving(self, save: Save, rank: int) -> Iterator[None]:
        """A copy of another node's shard comes inside."""
        with self._lock, self._careful("letting go of a copy"):
            self._coming.add((save, rank))
            self._let_go()
        try:
            yield
        finally:
            with self._lock, self._careful("letting go of a copy"):
                self._coming.discard((save, rank))
                self._let_go()

    def takes_copy(self, save: Save, size: int) -> bool:
        """Whether a shard of another node is wanted: not of an old save, and one more save of our own must still fit."""
        with self._lock, contextlib.suppress(OSError):
            if not (self.on and self._take_copies) or save < (self._committed or save):
                return False
            own = sum(self.own.path(key).stat().st_size for key in self.own.shards())
            return shutil.disk_usage(self.own.root).free > size + own
        return False

    def no_copies(self, why: str) -> None:
        """From now on; once."""
        with self._lock:
            if self._take_copies and self.copies.root.is_dir():
                self._take_copies = False
                self._warn(why)
            shutil.rmtree(self.copies.root, ignore_errors=True)

    def _let_go(self) -> None:
        own = {save for save, _ in self._in_flight}
        for save in surplus(self.own.saves(), committed=self._committed, in_flight=own):
            for key in self.own.shards(save):
                path = self.own.take_out(key)
                self._retire(path)
        coming = {save for save, _ in self._coming}
        for save in surplus(self.copies.saves(), committed=self._committed, in_flight=coming):
            for key in self.copies.shards(save):
                path = self.copies.take_out(key)
                path.unlink(missing_ok=True)
                self.copies.tidy(path.parent)

    def _retire(self, path: Path) -> None:
        """Give the file to a next save of this node, if it is ours alone: a directory may have a link to it, and then
        overwriting it would overwrite a checkpoint."""
        with contextlib.suppress(FileNotFoundError):
            free = sorted(self._free.iterdir()) if self._free.is_dir() else []  # workers prepare some, too
            for spare in free[len(self._ranks) :]:  # there were more ranks
                spare.unlink(missing_ok=True)
            ours = path.stat().st_nlink == 1 and path not in self._pinned
            if ours and len(free) < len(self._ranks):
                self._free.mkdir(exist_ok=True)
                path.replace(self._free / f"{uuid.uuid4().hex}.safetensors")
            else:
                path.unlink()
        self.own.tidy(path.parent)

    def _room(self, path: Path) -> bool:
        """Whether a next save as large as this one fits, for which files of older ones may be overwritten."""
        reusable = [*self._free.glob("*.safetensors")]
        for save in self.own.saves():
            reusable += [self.own.path(key) for key in self.own.shards(save) if save != _save_at(path)]
        spare = sum(file.stat().st_size for file in reusable)
        needed = path.stat().st_size * max(1, len(self._ranks))
        return shutil.disk_usage(path.parent).free + spare >= needed

    def _clear(self) -> None:
        """Delete all that is kept."""
        with contextlib.suppress(OSError):
            for key in self.own.shards():
                path = self.own.take_out(key)
                path.unlink(missing_ok=True)
                self.own.tidy(path.parent)
            shutil.rmtree(self.copies.root, ignore_errors=True)

    @contextlib.contextmanager
    def _careful(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.off(
                f"{what} on this node failed ({error.strerror or error}): checkpoints are not kept here any more"
            )


def _save_at(path: Path) -> Save:
    attempt, step = path.parent.name, path.parent.parent.name
    return int(attempt[1:]), int(step.removeprefix("step-"))


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Appears whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
