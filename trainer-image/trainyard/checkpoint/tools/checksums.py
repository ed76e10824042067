"""What a server itself says of an object's content."""

from __future__ import annotations

import base64
import os
from urllib.parse import urlsplit

from trainyard.checkpoint.format.digest import Descriptor


def server_checksum(
    uri: str, key: str, *, endpoint: str | None = None, region: str | None = None
) -> str | None:
    """SHA-256 of the object `key` under the run's prefix `uri`, in S3's words; None where none is kept (directories, servers
    without checksums, objects written with another one).

    Raises NotFound, StoreConfigError, StoreUnavailable.
    """
    if not uri.startswith("s3://"):
        return None
    from trainyard.checkpoint.s3_client import Where, client

    parts = urlsplit(uri)
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    asked = client(endpoint, region, settings)
    where = Where(uri, parts.netloc, str(asked.meta.endpoint_url))
    with where.errors(key):
        answer = asked.head_object(
            Bucket=parts.netloc, Key=f"{parts.path.strip('/')}/{key}", ChecksumMode="ENABLED"
        )
    return answer.get("ChecksumSHA256") or None


def expected_checksum(described: Descriptor) -> str:
    """The same of what was uploaded: of an object of one part its SHA-256, else that over the parts' with their number
    (https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html, "composite")."""
    if len(described.parts) == 1:
        return base64.b64encode(bytes.fromhex(described.parts[0])).decode()
    whole = base64.b64encode(bytes.fromhex(described.shard.sha256)).decode()
    return f"{whole}-{len(described.parts)}"
