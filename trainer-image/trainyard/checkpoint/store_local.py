"""A directory as a store: for a laptop, and for a volume that all nodes share."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainyard.checkpoint.errors import NotFound, StoreConfigError, StoreError, StoreUnavailable

_CHUNK = 1 << 20
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EBUSY}


class LocalStore:
    """`file:///absolute/path`. Files appear by rename; a create is link(2), which fails if the name is taken.

    link(2) rather than O_EXCL: the record must not be visible before it is whole.
    """

    def __init__(self, uri: str, run: str) -> None:
        self._root = Path(unquote(urlsplit(uri).path)) / run
        self._uri = f"{uri.rstrip('/')}/{run}"

    @property
    def uri(self) -> str:
        return self._uri

    def get(self, key: str) -> bytes:
        return b"".join(self.read(key))

    def read(self, key: str) -> Iterator[bytes]:
        with self._errors(key), (self._root / key).open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key), self._temporary(key) as temporary:
            temporary.write_bytes(data)
            temporary.replace(self._root / key)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        with self._errors(key), self._temporary(key) as temporary:
            shutil.copyfile(path, temporary)
            temporary.replace(self._root / key)

    def create(self, key: str, data: bytes) -> bool:
        with self._errors(key), self._temporary(key) as temporary:
            temporary.write_bytes(data)
            try:
                os.link(temporary, self._root / key)
            except FileExistsError:
                return False
        return True

    def list(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            folder = self._root / prefix.rpartition("/")[0]
            found = (p.relative_to(self._root).as_posix() for p in folder.rglob("*") if p.is_file())
            return sorted(k for k in found if k.startswith(prefix) and not Path(k).name.startswith("."))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._errors(key):
                path = self._root / key
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty: others live there
                    for parent in list(path.parents)[: len(Path(key).parents) - 1]:
                        parent.rmdir()

    @contextlib.contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        folder = (self._root / key).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{uuid.uuid4().hex}"
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
