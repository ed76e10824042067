"""`.ckpt` files: written whole or not at all, and read without running what is in them.

A place is a path, `file:///path`, `s3://bucket/key` or, to read from, `https://...` or an open binary file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias
from urllib.parse import urlsplit

from trainyard.checkpoint.format.digest import part_size
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.store_local import sync_folder
from trainyard.errors import MisconfigurationException
from trainyard.trainer.ckpt_errors import CheckpointFileDamaged, CheckpointFileNotFound, UnsafeCheckpoint
from trainyard.trainer.ckpt_places import (
    PATIENCE_SECONDS,
    Place,
    download,
    fetch,
    is_s3,
    local_path,
    nearest_file,
    open_s3,
    temporary_file,
)

MapLocation: TypeAlias = "Any"
"""What torch.load takes: a device, its name, a dict of them, a function, or None."""

_CHUNK = 1 << 20


def write(
    checkpoint: Mapping[str, Any], place: Place, storage_options: Mapping[str, Any] | None = None
) -> None:
    """Replace what is there, at once. Raises OSError, CheckpointError (s3), MisconfigurationException.

    `storage_options`, for s3:// only: `endpoint_url` and `region_name`, by default those of the TrainingRun, then AWS's.
    """
    if is_s3(place):
        store, key = open_s3(str(place), storage_options)
        with temporary_file() as path:
            _save(checkpoint, path)
            part = part_size(path.stat().st_size)
            with_retries(lambda: store.put_parts(key, path, part), seconds=PATIENCE_SECONDS)
        return
    if storage_options:
        raise MisconfigurationException(f"storage_options: {place} is a local path, which takes none")
    path = local_path(place)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, a checkpoint needs the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _save(checkpoint, temporary)
        temporary.replace(path)  # also replaces a link, not what it leads to
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read(
    place: Place | IO[bytes], map_location: MapLocation = None, weights_only: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The checkpoint. Nothing in it is run unless `weights_only=False` is said.

    Raises CheckpointFileNotFound, CheckpointFileDamaged, UnsafeCheckpoint, CheckpointError (s3), OSError.
    `map_location` None: the devices it was saved from, the CPU for those that are not here.
    """
    location = _where_possible if map_location is None else map_location
    safe = weights_only is not False
    if not isinstance(place, str | os.PathLike):
        return _load(place, "the given file", location, safe)
    if urlsplit(str(place)).scheme in ("http", "https"):
        with temporary_file() as path:
            download(str(place), path)
            return _load(path, str(place), location, safe)
    if is_s3(place):
        with temporary_file() as path:
            fetch(str(place), path, storage_options)
            return _load(path, str(place), location, safe)
    path = local_path(place)
    if not path.exists():
        raise CheckpointFileNotFound(f"checkpoint {path} does not exist{nearest_file(path)}")
    if path.is_dir():
        raise CheckpointFileDamaged(f"checkpoint {path} is a directory; give the name of a .ckpt file in it")
    return _load(path, str(path), location, safe)


def exists(place: Place) -> bool:
    """Raises CheckpointError when a bucket cannot be asked."""
    if not is_s3(place):
        return local_path(place).is_file()
    store, key = open_s3(str(place), None)
    return key in with_retries(lambda: store.list(key), seconds=PATIENCE_SECONDS)


def modified(place: Place) -> float:
    """Unix seconds, of a bucket by its clock; 0 for an object that is not there. Raises CheckpointError, OSError."""
    if not is_s3(place):
        return local_path(place).stat().st_mtime
    store, key = open_s3(str(place), None)
    listed = with_retries(lambda: store.listing(key), seconds=PATIENCE_SECONDS)
    return next((entry.modified for entry in listed if entry.key == key), 0.0)


def remove(place: Place) -> None:
    """No error if it is not there. Raises CheckpointError, OSError."""
    if is_s3(place):
        store, key = open_s3(str(place), None)
        with_retries(lambda: store.delete([key]), seconds=PATIENCE_SECONDS)
    else:
        local_path(place).unlink(missing_ok=True)


# ---- torch


def _save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """What was written is on the disk when this returns."""
    import torch

    with path.open("wb") as file:
        try:
            torch.save(dict(checkpoint), file)
        except RuntimeError as error:
            # The zip writer, when its file fails, says that its position is unexpected.
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else error from None
        file.flush()
        os.fsync(file.fileno())


def _load(source: Path | IO[bytes], name: str, location: MapLocation, safe: bool) -> dict[str, Any]:
    import pickle

    import torch

    if damaged := _damaged_records(source, name):
        raise CheckpointFileDamaged(
            f"checkpoint {name} is damaged ({_size(source)}): the checksum of {damaged[0]} in it is wrong"
        )
    try:
        loaded = torch.load(source, map_location=location, weights_only=safe)
    except pickle.UnpicklingError as error:
        if not safe:
            raise CheckpointFileDamaged(f"checkpoint {name}: {_line(error)}") from error
        found = _unsafe_types(source) or re.findall(r"GLOBAL ([\w.]+)", str(error))
        if not found:
            raise CheckpointFileDamaged(
                f"checkpoint {name} is damaged ({_size(source)}): {_line(error)}"
            ) from error
        raise UnsafeCheckpoint(
            f"checkpoint {name} holds {', '.join(found)}, and to load these would run code of theirs; by "
            "default only tensors and primitives are loaded. If you trust whoever wrote the file, say "
            "weights_only=False. To write files that need no trust, leave such objects out: "
            "save_hyperparameters(ignore=[...])"
        ) from None
    except MemoryError as error:
        raise CheckpointFileDamaged(
            f"checkpoint {name} ({_size(source)}) asks for more memory than there is"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        # A wrong map_location is a RuntimeError too: it speaks of a device, a broken zip file does not.
        # Cut off at some places, a file has torch seek to before its beginning.
        if "deserialize object on" in str(error) or (
            isinstance(error, OSError) and error.errno != errno.EINVAL
        ):
            raise
        raise CheckpointFileDamaged(
            f"checkpoint {name} is damaged or cut off ({_size(source)}): {_line(error)}"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointFileDamaged(f"{name} holds a {type(loaded).__name__}, not a checkpoint")
    return loaded


def _damaged_records(source: Path | IO[bytes], name: str) -> list[str]:
    """torch.save writes a zip file with checksums, and torch.load does not look at them: it would load the damage."""
    import zipfile

    start = None if isinstance(source, Path) else source.tell()
    damaged = []
    try:
        with zipfile.ZipFile(source) as archive:
            records = archive.infolist()
            if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
                # torch.save does not compress: a few bytes that unpack to more than there is memory are somebody's joke.
                raise CheckpointFileDamaged(
                    f"{name} is a zip file with compressed records, and no checkpoint"
                )
            for record in records:
                try:
                    with archive.open(record) as content:
                        while content.read(_CHUNK):
                            pass
                except (zipfile.BadZipFile, RuntimeError):  # RuntimeError: a flag says that it is encrypted
                    damaged.append(record.filename)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return []  # no zip file, or its end is gone: torch.load says so
    finally:
        if start is not None:
            source.seek(start)  # type: ignore[union-attr]
    # With torch.serialization.set_crc32_options(False) there are no true checksums at all.
    return damaged if len(damaged) < len(records) else []


def _unsafe_types(source: Path | IO[bytes]) -> list[str]:
    import torch

    with contextlib.suppress(Exception):  # it only reads zip files, and only makes the message better
        if not isinstance(source, Path):
            source.seek(0)
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    return []


def _where_possible(storage: Any, location: str) -> Any:
    """As torch.load by itself, but on the CPU where the device is not there."""
    import torch

    kind = location.split(":", maxsplit=1)[0]
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "xla": lambda: False,
    }  # fmt: skip
    return storage.cpu() if kind in there and not there[kind]() else None


def _size(source: Path | IO[bytes]) -> str:
    return f"{source.stat().st_size} bytes" if isinstance(source, Path) else "an open file"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text if " " in text else f"{type(error).__name__} {text}".strip()
