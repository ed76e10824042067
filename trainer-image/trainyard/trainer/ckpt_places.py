"""Where `.ckpt` files lie: at a path, `file:///path`, `s3://bucket/key` or, to read from, `https://...`."""

from __future__ import annotations

import contextlib
import difflib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote, urlsplit

from trainyard.checkpoint.errors import CheckpointError, NotFound
from trainyard.checkpoint.retry import with_retries
from trainyard.errors import MisconfigurationException
from trainyard.trainer.ckpt_errors import CheckpointFileNotFound

if TYPE_CHECKING:
    from trainyard.checkpoint.stores import Store

Place: TypeAlias = "str | os.PathLike[str]"

PATIENCE_SECONDS = 60.0
_HTTP_SECONDS = 30.0


def is_s3(place: Place) -> bool:
    return str(place).startswith("s3://")


def local_path(place: Place) -> Path:
    """Of a path or file:// URI. Raises MisconfigurationException for another scheme."""
    text = os.fspath(place)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Path(text).expanduser()
    if scheme != "file":
        raise MisconfigurationException(
            f"{text}: a checkpoint is at a path, file:///path or s3://bucket/key, not at {scheme}://"
        )
    return Path(unquote(urlsplit(text).path))


def open_s3(uri: str, options: Mapping[str, Any] | None) -> tuple[Store, str]:
    from trainyard.checkpoint.stores import open_parent

    options = dict(options or {})
    options |= options.pop("client_kwargs", None) or {}
    known = {"endpoint_url", "region_name"}
    if unknown := sorted(set(options) - known):
        raise MisconfigurationException(
            f"storage_options: {', '.join(unknown)} unknown; s3:// takes {', '.join(sorted(known))}; credentials come "
            "from the AWS_* environment"
        )
    return open_parent(uri, endpoint=options.get("endpoint_url"), region=options.get("region_name"))


def fetch(uri: str, path: Path, options: Mapping[str, Any] | None) -> None:
    store, key = open_s3(uri, options)

    def download() -> None:
        with path.open("wb") as file:
            for chunk in store.read(key):
                file.write(chunk)

    try:
        with_retries(download, seconds=PATIENCE_SECONDS)
    except NotFound as error:
        raise CheckpointFileNotFound(f"checkpoint {uri} does not exist") from error


def download(url: str, path: Path) -> None:
    import shutil
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=_HTTP_SECONDS) as answer, path.open("wb") as file:  # noqa: S310 - http or https
            shutil.copyfileobj(answer, file)
    except HTTPError as error:
        kind: Callable[[str], CheckpointError] = (
            CheckpointFileNotFound if error.code == 404 else CheckpointError
        )
        raise kind(f"checkpoint {url}: the server says {error.code} {error.reason}") from error
    except (URLError, TimeoutError) as error:
        raise CheckpointError(f"checkpoint {url} cannot be fetched: {error}") from error


@contextlib.contextmanager
def temporary_file() -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix="trainyard-", suffix=".ckpt")
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix == path.suffix)
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)
    return f"; its folder has {near[0]}" if near else f"; its folder has no {path.suffix or 'such'} file"
