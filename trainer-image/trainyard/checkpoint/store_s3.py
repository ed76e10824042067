"""A bucket as a store (boto3). Needs List, Get and Put on the run's prefix, and Delete for the pruning."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from trainyard.checkpoint.errors import NotFound, ShardInvalid, StoreError, StoreUnavailable
from trainyard.checkpoint.format.digest import digest, spans, tree_hash
from trainyard.checkpoint.retry import pause_after, with_retries
from trainyard.checkpoint.s3_client import Where, b64, client, code_of, status_of
from trainyard.checkpoint.stores import GET_LIMIT, ConditionsNotOffered, Leftover, Listed, probe_conditional
from trainyard.checkpoint.transfer import Body, Pace, Stopped, in_parallel, mapped

_CHUNK = 1 << 20
WORKERS = 8
"""Parts under way at a time, for all uploads of a store together."""
_PART_SECONDS = 30.0
"""How long one part is tried again before the whole upload is given up."""
_TAKEN = {"PreconditionFailed", "412"}
_GONE = {"NoSuchUpload", "InvalidPart"}
"""The upload is not there any more: finished or aborted."""
_NOT_OFFERED = {"NotImplemented", "501"}
_ALGORITHM = "SHA256"
"""Of the checksums that the server is given."""


class S3Store:
    """`s3://bucket/prefix`. Conditional creation is `If-None-Match: *` (S3 since 2024-08; versitygw, MinIO, Ceph)."""

    def __init__(self, uri: str, run: str, *, endpoint: str | None = None, region: str | None = None) -> None:
        parts = urlsplit(uri)
        self._bucket = parts.netloc
        self._prefix = "".join(f"{part}/" for part in (parts.path.strip("/"), run) if part)
        self._uri = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
        self._client = client(endpoint, region, settings)
        self._where = Where(self._uri, self._bucket, str(self._client.meta.endpoint_url))
        self._pace = Pace(WORKERS)
        self._conditional: bool | None = None

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def conditional(self) -> bool:
        if self._conditional is None:
            self._conditional = probe_conditional(self)
        return self._conditional

    # ---- reading

    def get(self, key: str, limit: int = GET_LIMIT) -> bytes:
        pieces, size = [], 0
        for piece in self.read(key):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise ShardInvalid(f"{self._uri}/{key}: is larger than {limit} bytes")
        return b"".join(pieces)

    def read(self, key: str) -> Iterator[bytes]:
        with self._where.errors(key):
            answer = self._ask("get_object", Key=self._prefix + key)
            with contextlib.closing(answer["Body"]) as body:
                yield from body.iter_chunks(_CHUNK)

    def read_into(self, key: str, begin: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        end = begin + len(buffer)
        with self._request(key):
            try:
                answer = self._ask("get_object", Key=self._prefix + key, Range=f"bytes={begin}-{end - 1}")
            except Exception as error:
                if _status(error) == 416:
                    raise ShardInvalid(f"{self._uri}/{key}: ends before byte {begin}") from error
                raise
            with contextlib.closing(answer["Body"]) as body:
                self._check_range(key, answer, begin, end)
                done = 0
                while done < len(buffer):
                    count = body.readinto(buffer[done : done + _CHUNK])
                    if not count:
                        raise StoreUnavailable(
                            f"{self._uri}/{key}: the answer was cut off {len(buffer) - done} bytes before its end"
                        )
                    done += count
                body.read(1)  # the end of the answer is read, so that the connection can be used again

    def _check_range(self, key: str, answer: Any, begin: int, end: int) -> None:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.get("ContentRange") or "")
        if found is None:
            if begin == 0 and answer["ContentLength"] == end:
                return  # the whole object is what was asked for
            raise StoreError(f"{self._uri}/{key}: {self._where.endpoint} does not serve ranges")
        if found[3] != "*" and int(found[3]) < end:
            raise ShardInvalid(f"{self._uri}/{key}: has {found[3]} bytes, not {end}")
        if (int(found[1]), int(found[2])) != (begin, end - 1):
            raise StoreUnavailable(f"{self._uri}/{key}: asked for bytes {begin}-{end - 1}, got {found[0]}")

    # ---- writing

    def put(self, key: str, data: bytes) -> None:
        with self._request(key):
            self._put(key, memoryview(data), digest(data))

    def put_parts(self, key: str, path: Path, part: int) -> list[str]:
        with path.open("rb") as file:
            pieces = spans(os.fstat(file.fileno()).st_size, part)
            if not pieces:
                self.put(key, b"")
                return []
            if len(pieces) > 1:
                return self._multipart(key, file, pieces)
            with mapped(file, *pieces[0]) as view:
                sha256 = digest(view)
                self._patiently(key, None, lambda: self._put(key, view, sha256))
                return [sha256]

    def create(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self._request(key):
            try:
                self._put(
                    key, memoryview(data), digest(data), IfNoneMatch="*", ContentType="application/json"
                )
            except ClientError as error:
                if code_of(error) in _TAKEN:
                    return False
                if code_of(error) in _NOT_OFFERED:
                    raise ConditionsNotOffered(
                        f"{self._uri}: {self._where.endpoint} has no conditional writes"
                    ) from error
                raise
        return True

    def _put(self, key: str, view: memoryview, sha256: str, **headers: str) -> None:
        name = self._prefix + key
        self._ask("put_object", Body=Body(view), Key=name, ChecksumSHA256=b64(sha256), **headers)

    def _multipart(self, key: str, file: IO[bytes], pieces: list[tuple[int, int]]) -> list[str]:
        name = self._prefix + key
        with self._request(key):
            upload = self._ask("create_multipart_upload", Key=name, ChecksumAlgorithm=_ALGORITHM)["UploadId"]

        def send(number: int, stop: threading.Event) -> tuple[str, str]:
            """(ETag, SHA-256) of a part."""
            if stop.is_set():
                raise Stopped
            with mapped(file, *pieces[number]) as view:
                sha256 = digest(view)
                answer = self._patiently(
                    key, stop,
                    lambda: self._ask(
                        "upload_part", Body=Body(view), Key=name, UploadId=upload, PartNumber=number + 1,
                        ChecksumSHA256=b64(sha256),
                    ),
                )  # fmt: skip
                return answer["ETag"], sha256

        try:
            sent = in_parallel(len(pieces), send, workers=WORKERS, name="upload-part")
            digests = [sha256 for _, sha256 in sent]
            parts = [
                {"PartNumber": n, "ETag": etag, "ChecksumSHA256": b64(sha256)}
                for n, (etag, sha256) in enumerate(sent, 1)
            ]
            self._complete(key, upload, parts, f"{b64(tree_hash(digests))}-{len(parts)}")
        except BaseException:
            with contextlib.suppress(StoreError):  # what is left is collected later
                self.abort(Leftover(key=key, upload_id=upload, begun=0.0))
            raise
        return digests

    def _complete(self, key: str, upload: str, parts: list[dict[str, Any]], checksum: str) -> None:
        """Raises StoreUnavailable unless the object is there with `checksum`, S3's one of all parts' ones."""
        name = self._prefix + key
        try:
            answer = self._patiently(key, None, lambda: self._put_together(name, upload, parts))
            found = answer.get("ChecksumSHA256")
        except StoreUnavailable as error:
            if _code(error.__cause__) not in _GONE:
                raise
            # An earlier try may have done it, and only its answer was lost.
            try:
                with self._where.errors(key):
                    found = self._ask("head_object", Key=name, ChecksumMode="ENABLED").get(
                        "ChecksumSHA256", ""
                    )
            except NotFound:
                raise error from None
        if found not in (None, checksum):  # not all servers say it
            raise StoreUnavailable(
                f"{self._uri}/{key}: the server has put together something else than was sent"
            )

    def _put_together(self, name: str, upload: str, parts: list[dict[str, Any]]) -> Any:
        """The server's answer. Raises ClientError: NoSuchUpload also where it has lost the upload and does not say so."""
        from botocore.exceptions import ClientError

        try:
            return self._ask(
                "complete_multipart_upload", Key=name, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except ClientError as error:
            # 503 says that there are too many requests, and nothing about the upload.
            if status_of(error) < 500 or status_of(error) == 503 or not self._lost(name, upload, len(parts)):
                raise
            lost = {"Error": {"Code": "NoSuchUpload", "Message": f"{code_of(error)}, and the upload is lost"}}
            raise ClientError(lost, error.operation_name) from error

    def _lost(self, name: str, upload: str, count: int) -> bool:
        """Whether the server no longer has the upload as it was begun, with `count` parts. False if it does not tell.

        versitygw 1.8 brings the folder of an aborted upload back for parts that were on their way, some or all, but
        without what it had noted of the upload ("null" for the checksum's algorithm), and then answers 500 for ever.
        """
        try:
            with self._where.errors(name):
                pages = list(
                    self._client.get_paginator("list_parts").paginate(
                        Bucket=self._bucket, Key=name, UploadId=upload
                    )
                )
        except StoreError as unlisted:
            return _code(unlisted.__cause__) in _GONE
        known = sum(len(page.get("Parts", [])) for page in pages)
        return known < count or any(page.get("ChecksumAlgorithm", _ALGORITHM) != _ALGORITHM for page in pages)

    # ---- the rest

    def list(self, prefix: str) -> list[str]:
        return [entry.key for entry in self.listing(prefix)]

    def listing(self, prefix: str) -> Sequence[Listed]:
        with self._where.errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            return sorted(
                Listed(
                    key=o["Key"].removeprefix(self._prefix),
                    size=o["Size"],
                    modified=o["LastModified"].timestamp(),
                )
                for page in pages
                for o in page.get("Contents", [])
            )

    def delete(self, keys: Iterable[str]) -> None:
        # One by one: DeleteObjects wants a Content-MD5 from some servers, and a prune is a handful of keys.
        for key in keys:
            with self._where.errors(key):
                self._ask("delete_object", Key=self._prefix + key)

    def leftovers(self, prefix: str = "") -> Sequence[Leftover]:
        with self._where.errors(prefix):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            return [
                Leftover(
                    key=u["Key"].removeprefix(self._prefix), upload_id=u["UploadId"],
                    begun=u["Initiated"].timestamp(),
                )
                for page in pages
                for u in page.get("Uploads", [])
            ]  # fmt: skip

    def abort(self, leftover: Leftover) -> None:
        from botocore.exceptions import ClientError

        with self._where.errors(leftover.key):
            try:
                self._ask(
                    "abort_multipart_upload", Key=self._prefix + leftover.key, UploadId=leftover.upload_id
                )
            except ClientError as error:
                if code_of(error) not in ("NoSuchUpload", "404"):
                    raise

    def _ask(self, operation: str, *, Key: str, **arguments: Any) -> Any:
        """One request; a second one at once if a connection that was kept from before turns out to be closed."""
        from botocore.exceptions import ConnectionClosedError

        call = getattr(self._client, operation)
        try:
            return call(Bucket=self._bucket, Key=Key, **arguments)
        except ConnectionClosedError:
            body = arguments.get("Body")
            if body is not None:
                body.seek(0)
            return call(Bucket=self._bucket, Key=Key, **arguments)

    @contextlib.contextmanager
    def _request(self, key: str) -> Iterator[None]:
        """One request, within the pace that the server allows."""
        try:
            with self._pace.turn(), self._where.errors(key):
                yield
        except StoreUnavailable as error:
            if error.slow_down:
                self._pace.slowed(pause_after(error, 1.0))
            raise
        self._pace.went_well()

    def _patiently(self, key: str, stop: threading.Event | None, call: Callable[[], Any]) -> Any:
        """What `call` returns, tried again for a while: one part of many should not cost all of them."""

        def once() -> Any:
            if stop is not None and stop.is_set():
                raise Stopped
            with self._request(key):
                return call()

        def on_retry(error: StoreUnavailable, _tries: int) -> None:
            if _code(error.__cause__) in _GONE:
                raise error

        return with_retries(once, seconds=_PART_SECONDS, on_retry=on_retry)


def _code(error: BaseException | None) -> str:
    return code_of(error) if isinstance(getattr(error, "response", None), dict) else ""


def _status(error: BaseException | None) -> int:
    return status_of(error) if isinstance(getattr(error, "response", None), dict) else 0
