"""Signing requests as AWS does."""

from __future__ import annotations

import datetime

from devcluster.s3 import S3Access, sign


def test_signature_is_that_of_botocore() -> None:
    now = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    signed = sign(S3Access("127.0.0.1", 9000, "key", "secret"), "PUT", "/bucket", now)
    assert signed["x-amz-date"] == "20260102T030405Z"
    # Taken from botocore's SigV4Auth for the same request.
    assert signed["Authorization"].endswith(
        "Signature=54c6158931d4763fb30e358c4c92168f39790dc3eff63aad4677107dd15a60b2"
    )
