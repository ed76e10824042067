"""A directory as a store: for a laptop, and for a volume that all nodes share."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from trainyard.checkpoint.errors import NotFound, ShardInvalid, StoreConfigError, StoreError, StoreUnavailable
from trainyard.checkpoint.format.digest import digest, spans
from trainyard.checkpoint.stores import GET_LIMIT, Leftover, Listed
from trainyard.checkpoint.transfer import Stopped, in_parallel, mapped

_CHUNK = 1 << 20
_WORKERS = 4
_TRIES = 5
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EBUSY}


class LocalStore:
    """`file:///absolute/path`. Files appear by rename; a create is link(2), which fails if the name is taken.

    link(2) rather than O_EXCL: the record must not be visible before it is whole. A file is on the disk before it gets its
    name: no power cut leaves a record without its data.
    """

    def __init__(self, uri: str, run: str) -> None:
        self._root = Path(unquote(urlsplit(uri).path)) / run
        self._uri = f"{uri.rstrip('/')}/{run}"

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def conditional(self) -> bool:
        return True

    # ---- reading

    def get(self, key: str, limit: int = GET_LIMIT) -> bytes:
        with self._errors(key), self._open(key) as file:
            data = b""
            while len(data) <= limit and (more := file.read(limit + 1 - len(data))):
                data += more
        if len(data) > limit:
            raise ShardInvalid(f"{self._uri}/{key}: is larger than {limit} bytes")
        return data

    def read(self, key: str) -> Iterator[bytes]:
        with self._errors(key), self._open(key) as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def read_into(self, key: str, begin: int, buffer: memoryview) -> None:
        with self._errors(key), self._open(key) as file:
            done = 0
            while done < len(buffer):
                count = os.preadv(file.fileno(), [buffer[done:]], begin + done)
                if not count:
                    raise ShardInvalid(f"{self._uri}/{key}: ends before byte {begin + len(buffer)}")
                done += count

    def _open(self, key: str) -> BinaryIO:
        """A regular file under the run's folder, and nothing else: whoever may write there may not have us read elsewhere, or
        wait for a pipe. Raises ShardInvalid, OSError."""
        path = self._root / key
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ShardInvalid(f"{self._uri}/{key}: is no regular file")
            if not path.resolve().is_relative_to(self._root.resolve()):
                raise ShardInvalid(f"{self._uri}/{key}: is a link that leads out of the run's folder")
        except BaseException:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb", buffering=0)

    # ---- writing

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key), self._temporary(key) as temporary:
            _write(temporary, data)
            temporary.replace(self._root / key)
            sync_folder((self._root / key).parent)

    def put_parts(self, key: str, path: Path, part: int) -> list[str]:
        # A copy, no link: the staged file is written over by a later save.
        with path.open("rb") as source, self._errors(key), self._temporary(key) as temporary:
            with temporary.open("wb", buffering=0) as target:
                pieces = spans(os.fstat(source.fileno()).st_size, part)

                def copy(number: int, stop: threading.Event) -> str:
                    begin, end = pieces[number]
                    if stop.is_set():
                        raise Stopped
                    with mapped(source, begin, end) as view:
                        done = 0
                        while done < len(view):
                            done += os.pwrite(target.fileno(), view[done:], begin + done)
                        return digest(view)

                digests = in_parallel(len(pieces), copy, workers=_WORKERS, name="copy-part")
                os.fsync(target.fileno())
            temporary.replace(self._root / key)
            sync_folder((self._root / key).parent)
            return digests

    def create(self, key: str, data: bytes) -> bool:
        with self._errors(key), self._temporary(key) as temporary:
            _write(temporary, data)
            try:
                os.link(temporary, self._root / key)
            except FileExistsError:
                return False
            sync_folder((self._root / key).parent)
        return True

    # ---- the rest

    def list(self, prefix: str) -> list[str]:
        return [entry.key for entry in self.listing(prefix)]

    def listing(self, prefix: str) -> Sequence[Listed]:
        return sorted(entry for entry in self._files(prefix) if not _is_temporary(entry.key))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._errors(key):
                path = self._root / key
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty: others live there
                    for parent in list(path.parents)[: len(Path(key).parents) - 1]:
                        parent.rmdir()

    def leftovers(self, prefix: str = "") -> Sequence[Leftover]:
        """Temporary files; their key is that of the file itself."""
        return [
            Leftover(key=entry.key, upload_id="", begun=entry.modified)
            for entry in self._files(prefix)
            if _is_temporary(entry.key)
        ]

    def abort(self, leftover: Leftover) -> None:
        self.delete([leftover.key])

    def _files(self, prefix: str) -> Iterator[Listed]:
        with self._errors(prefix):
            for path in (self._root / prefix.rpartition("/")[0]).rglob("*"):
                key = path.relative_to(self._root).as_posix()
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    status = path.lstat()
                    # What is no file is there, too, and takes its name: only reading it is refused.
                    if key.startswith(prefix) and not stat.S_ISDIR(status.st_mode):
                        yield Listed(key=key, size=status.st_size, modified=status.st_mtime)

    @contextlib.contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        """Where to write what will be `key`; nothing is left there in the end."""
        folder = (self._root / key).parent
        temporary = folder / f".{uuid.uuid4().hex}.tmp"
        for last in [False] * (_TRIES - 1) + [True]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                temporary.touch()
                break
            except FileNotFoundError:  # a delete takes folders away that are empty
                if last:
                    raise
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"{self._uri}/{key}: not found") from error
        except (NotADirectoryError, FileExistsError) as error:
            raise StoreConfigError(
                f"{self._uri}: {error.filename} is in the way: it is not a directory"
            ) from error
        except PermissionError as error:
            raise StoreConfigError(
                f"{self._uri}: no permission to use {error.filename}; give user {os.getuid()} read and write access"
            ) from error
        except OSError as error:
            if error.errno == errno.EROFS:
                raise StoreConfigError(f"{self._uri}: the file system is read-only") from error
            kind = StoreUnavailable if error.errno in _TRANSIENT else StoreError
            raise kind(f"{self._uri}/{key}: {error.strerror or error}") from error


def _is_temporary(key: str) -> bool:
    return Path(key).name.startswith(".")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The new name survives a power cut, too. Some file systems cannot; then there is nothing to do."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
