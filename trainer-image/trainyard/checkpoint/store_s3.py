"""A bucket as a store (boto3). Needs List, Get and Put on the run's prefix, and Delete for the pruning."""

from __future__ import annotations

import base64
import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainyard.checkpoint.errors import NotFound, StoreConfigError, StoreError, StoreUnavailable

_CHUNK = 1 << 20
_MULTIPART = 64 << 20
_PART = 32 << 20
_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
    "XAdminUserNotFound",  # what versitygw says for InvalidAccessKeyId
}  # fmt: skip
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"}
_ABSENT = {"NoSuchKey", "404", "NotFound"}
_TAKEN = {"PreconditionFailed", "412"}


class S3Store:
    """`s3://bucket/prefix`. Conditional creation is `If-None-Match: *` (S3 since 2024-08; versitygw, MinIO, Ceph)."""

    def __init__(self, uri: str, run: str, *, endpoint: str | None = None, region: str | None = None) -> None:
        parts = urlsplit(uri)
        self._bucket = parts.netloc
        self._prefix = "".join(f"{part}/" for part in (parts.path.strip("/"), run) if part)
        self._uri = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
        self._client = _client(endpoint, region, settings)
        self._endpoint = str(self._client.meta.endpoint_url)

    @property
    def uri(self) -> str:
        return self._uri

    def get(self, key: str) -> bytes:
        return b"".join(self.read(key))

    def read(self, key: str) -> Iterator[bytes]:
        with self._errors(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            with contextlib.closing(answer["Body"]) as body:
                yield from body.iter_chunks(_CHUNK)

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client.put_object(
                Bucket=self._bucket, Key=self._prefix + key, Body=data, ChecksumAlgorithm="SHA256"
            )

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Up to 64 MiB the server itself checks the SHA-256. Larger ones go in parts with a CRC32 over the whole:
        S3 has no full-object SHA-256 for multipart uploads, and boto3's default there, a checksum of checksums, is
        not checked by a later GET."""
        with self._errors(key):
            if path.stat().st_size <= _MULTIPART:
                checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
                with path.open("rb") as body:
                    self._client.put_object(
                        Bucket=self._bucket, Key=self._prefix + key, Body=body, ChecksumSHA256=checksum
                    )
                return
            from boto3.s3.transfer import TransferConfig

            self._client.upload_file(
                str(path), self._bucket, self._prefix + key,
                ExtraArgs={"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"},
                Config=TransferConfig(multipart_threshold=_MULTIPART, multipart_chunksize=_PART, max_concurrency=8),
            )  # fmt: skip

    def create(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self._errors(key):
            try:
                self._client.put_object(
                    Bucket=self._bucket, Key=self._prefix + key, Body=data, IfNoneMatch="*",
                    ContentType="application/json", ChecksumAlgorithm="SHA256",
                )  # fmt: skip
            except ClientError as error:
                if _code(error) in _TAKEN:
                    return False
                raise
        return True

    def list(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            return sorted(
                o["Key"].removeprefix(self._prefix) for page in pages for o in page.get("Contents", [])
            )

    def delete(self, keys: Iterable[str]) -> None:
        # One by one: DeleteObjects wants a Content-MD5 from some servers, and a prune is a handful of keys.
        for key in keys:
            with self._errors(key):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore import exceptions as aws
        from urllib3.exceptions import HTTPError

        try:
            yield
        except aws.ClientError as error:
            raise self._client_error(error, key) from error
        except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError) as error:
            raise StoreConfigError(
                f"{self._uri}: no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "(in a TrainingRun: spec.checkpoint.credentialsSecret)"
            ) from error
        except aws.ParamValidationError as error:
            raise StoreConfigError(f"{self._uri}: not a valid bucket or key: {_line(error)}") from error
        except aws.ConnectionError as error:  # refused, DNS, proxy, both time-outs
            raise StoreUnavailable(
                f"{self._uri}: the S3 endpoint {self._endpoint} cannot be reached ({type(error).__name__}); check the "
                "endpoint's address and that it is up"
            ) from error
        except (aws.BotoCoreError, HTTPError, Boto3Error, OSError) as error:
            raise StoreUnavailable(f"{self._uri}/{key}: {type(error).__name__}: {_line(error)}") from error

    def _client_error(self, error: Any, key: str) -> StoreError:
        code = _code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return StoreConfigError(
                f"{self._uri}: bucket {self._bucket!r} does not exist at {self._endpoint}; create it or correct the "
                "checkpoint URI"
            )
        if code in _ABSENT:
            return NotFound(f"{self._uri}/{key}: not found")
        if code in _CREDENTIALS:
            return StoreConfigError(
                f"{self._uri}: {self._endpoint} refuses the S3 credentials ({code}); check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (in a TrainingRun: the Secret of spec.checkpoint.credentialsSecret)"
            )
        if code in _DENIED or status == 403:
            return StoreConfigError(
                f"{self._uri}: no permission for {error.operation_name} ({code}); the credentials need s3:ListBucket, "
                "s3:GetObject, s3:PutObject and s3:DeleteObject here"
            )
        if status >= 500 or status in (408, 409, 429) or code in ("SlowDown", "RequestTimeout", "BadDigest"):
            return StoreUnavailable(f"{self._uri}/{key}: {code} ({status})")
        if code in ("InvalidBucketName", "PermanentRedirect", "IllegalLocationConstraintException"):
            return StoreConfigError(f"{self._uri}: {code}: {_line(error)}")
        return StoreError(f"{self._uri}/{key}: {_line(error)}")


@functools.cache
def _client(endpoint: str | None, region: str | None, settings: tuple[tuple[str, str], ...]) -> Any:
    """One client for each endpoint, region and AWS environment.

    Making one costs a third of a second of CPU (botocore reads the description of S3). The zygote makes it once, before
    it forks: it has no connection yet and no thread, and all ranks of all attempts have it.
    """
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    return session.client(
        "s3",
        endpoint_url=endpoint,
        # Every S3 request must be signed for some region; servers other than AWS take this one.
        region_name=region or session.region_name or "us-east-1",
        config=Config(
            connect_timeout=3,
            read_timeout=30,
            max_pool_connections=16,
            # Path style unless it is AWS: `bucket.10.0.0.7:9000` does not resolve.
            s3={"addressing_style": "auto" if ".amazonaws.com" in _endpoint(session, endpoint) else "path"},
            retries={"mode": "standard", "total_max_attempts": 2},  # the patience is in retry.with_retries
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _endpoint(session: Any, endpoint: str | None) -> str:
    """The URL that a client of `session` would use: argument, environment, profile, in that order."""
    if endpoint:
        return endpoint
    return str(session.client("s3", region_name=session.region_name or "us-east-1").meta.endpoint_url)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
