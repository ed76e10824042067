"""The boto3 client of a bucket, and what its errors mean to us."""

from __future__ import annotations

import base64
import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from trainyard.checkpoint.errors import NotFound, StoreConfigError, StoreError, StoreUnavailable

CONNECTIONS = 16
CONNECT_SECONDS = 3.0
READ_SECONDS = 30.0
"""How long the server may be silent."""
_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
    "XAdminUserNotFound",  # what versitygw says for InvalidAccessKeyId
}  # fmt: skip
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"}
_ABSENT = {"NoSuchKey", "404", "NotFound"}
_BUSY = {
    "SlowDown",
    "ServiceUnavailable",
    "TooManyRequests",
    "ThrottlingException",
    "RequestLimitExceeded",
    "503",
    "429",
}
_AGAIN = {
    "RequestTimeout",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
    "NoSuchUpload",
    "InvalidPart",
}
_SIGNER = "trainyard-s3v4"


@dataclass(frozen=True, slots=True)
class Where:
    """For messages."""

    uri: str
    bucket: str
    endpoint: str

    @contextlib.contextmanager
    def errors(self, key: str) -> Iterator[None]:
        """Raises StoreConfigError, NotFound, StoreUnavailable or StoreError for what boto3 raises."""
        from botocore import exceptions as aws
        from urllib3.exceptions import HTTPError

        try:
            yield
        except aws.ClientError as error:
            raise self._client_error(error, key) from error
        except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError) as error:
            raise StoreConfigError(
                f"{self.uri}: no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "(in a TrainingRun: spec.checkpoint.credentialsSecret)"
            ) from error
        except aws.ParamValidationError as error:
            raise StoreConfigError(f"{self.uri}: not a valid bucket or key: {_line(error)}") from error
        except aws.ConnectionError as error:  # refused, DNS, proxy, both time-outs
            raise StoreUnavailable(
                f"{self.uri}: the S3 endpoint {self.endpoint} cannot be reached ({type(error).__name__}); check the "
                "endpoint's address and that it is up"
            ) from error
        except (aws.BotoCoreError, HTTPError, OSError) as error:
            raise StoreUnavailable(f"{self.uri}/{key}: {type(error).__name__}: {_line(error)}") from error

    def _client_error(self, error: Any, key: str) -> StoreError:
        code, status = code_of(error), status_of(error)
        if code == "NoSuchBucket":
            return StoreConfigError(
                f"{self.uri}: bucket {self.bucket!r} does not exist at {self.endpoint}; create it or correct the "
                "checkpoint URI"
            )
        if code in _ABSENT:
            return NotFound(f"{self.uri}/{key}: not found")
        if code in _CREDENTIALS:
            return StoreConfigError(
                f"{self.uri}: {self.endpoint} refuses the S3 credentials ({code}); check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (in a TrainingRun: the Secret of spec.checkpoint.credentialsSecret)"
            )
        if code in _DENIED or status == 403:
            return StoreConfigError(
                f"{self.uri}: no permission for {error.operation_name} ({code}); the credentials need s3:ListBucket, "
                "s3:GetObject, s3:PutObject and s3:DeleteObject here"
            )
        if code in _BUSY or status in (429, 503):
            return StoreUnavailable(
                f"{self.uri}/{key}: {code} ({status}): the server asks for fewer requests",
                slow_down=True, retry_after=_retry_after(error),
            )  # fmt: skip
        if status >= 500 or status in (408, 409) or code in _AGAIN:
            return StoreUnavailable(f"{self.uri}/{key}: {code} ({status})")
        if code in ("InvalidBucketName", "PermanentRedirect", "IllegalLocationConstraintException"):
            return StoreConfigError(f"{self.uri}: {code}: {_line(error)}")
        return StoreError(f"{self.uri}/{key}: {_line(error)}")


@functools.cache
def client(endpoint: str | None, region: str | None, settings: tuple[tuple[str, str], ...]) -> Any:
    """One client for each endpoint, region and AWS environment (`settings`).

    Making one costs a third of a second of CPU (botocore reads the description of S3). The zygote makes it once, before
    it forks: it has no connection yet and no thread, and all ranks of all attempts have it.
    """
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    made = session.client(
        "s3",
        endpoint_url=endpoint,
        # Every S3 request must be signed for some region; servers other than AWS take this one.
        region_name=region or session.region_name or "us-east-1",
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            max_pool_connections=CONNECTIONS,
            # Path style unless it is AWS: `bucket.10.0.0.7:9000` does not resolve.
            s3={"addressing_style": "auto" if ".amazonaws.com" in _endpoint(session, endpoint) else "path"},
            # The patience is in retry.with_retries, which knows of Retry-After and of newer attempts.
            retries={"mode": "standard", "total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    _sign_by_checksum(made)
    return made


def _sign_by_checksum(made: Any) -> None:
    """Signs an upload by the SHA-256 that goes with it anyway; botocore would read the body a second time for that."""
    from botocore import auth

    class ByChecksum(auth.S3SigV4Auth):  # type: ignore[misc]
        def payload(self, request: Any) -> str:
            checksum = request.headers.get("x-amz-checksum-sha256")
            if checksum is None:
                return str(super().payload(request))
            return base64.b64decode(checksum).hex()

    auth.AUTH_TYPE_MAPS.setdefault(_SIGNER, ByChecksum)
    for operation in ("PutObject", "UploadPart"):
        made.meta.events.register_first(f"choose-signer.s3.{operation}", _choose)


def _choose(context: Any, **_: Any) -> str | None:
    # Not for S3 Express and the like, which have signers of their own.
    return _SIGNER if context.get("auth_type") in (None, "v4") else None


def b64(hexadecimal: str) -> str:
    """As S3's checksum headers have it."""
    return base64.b64encode(bytes.fromhex(hexadecimal)).decode()


def code_of(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _retry_after(error: Any) -> float | None:
    """RFC 9110, 10.2.3: seconds or a date."""
    text = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after")
    if not text:
        return None
    try:
        return max(
            0.0,
            float(text)
            if text.strip().isdecimal()
            else parsedate_to_datetime(text).timestamp() - time.time(),
        )
    except (ValueError, OverflowError):
        return None


def _endpoint(session: Any, endpoint: str | None) -> str:
    """The URL that a client of `session` would use: argument, environment, profile, in that order."""
    if endpoint:
        return endpoint
    return str(session.client("s3", region_name=session.region_name or "us-east-1").meta.endpoint_url)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
