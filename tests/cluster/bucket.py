"""What is in the bucket, and who asked for what: the S3 server's own word."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest

from devcluster.scenario import Scenario

READS = ("GetObject", "HeadObject", "ListObjectsV2", "ListObjects")


def s3_client(scenario: Scenario) -> Any:
    """Of the server that the scenario's runs save to."""
    s3 = scenario.env.s3
    return boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )


@dataclass(frozen=True)
class Bucket:
    """The prefix of one run."""

    scenario: Scenario
    uid: str

    @property
    def name(self) -> str:
        return urlsplit(self.scenario.env.s3.uri).netloc

    @property
    def prefix(self) -> str:
        path = urlsplit(self.scenario.spec()["checkpoint"]["uri"]).path.strip("/")
        return f"{path}/{self.uid}/"

    def client(self) -> Any:
        return s3_client(self.scenario)

    def objects(self) -> list[str]:
        """Relative to the prefix; unfinished uploads are not in it."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix)
        return sorted(o["Key"].removeprefix(self.prefix) for page in pages for o in page.get("Contents", []))

    def commits(self) -> list[dict[str, Any]]:
        """Commit records, oldest first."""
        client = self.client()
        found = [
            json.loads(client.get_object(Bucket=self.name, Key=self.prefix + key)["Body"].read())
            for key in self.objects()
            if key.startswith("commits/")
        ]
        return sorted((r for r in found if r["kind"] == "commit"), key=lambda r: r["seq"])


class AccessLog:
    """The requests from now on, of every client. For the embedded cluster only."""

    def __init__(self, scenario: Scenario) -> None:
        if scenario.env.cluster is None:
            pytest.skip("the access log of another S3 server cannot be read from here")
        self._path = scenario.env.cluster.logs("s3-access")
        self._begin = self._path.stat().st_size

    def requests(self, bucket: Bucket) -> list[tuple[str, str]]:
        """(operation, URL) of those about the run, in order; an operation is named as in S3's API."""
        with self._path.open("rb") as file:
            file.seek(self._begin)
            lines = file.read().decode().splitlines()
        found = []
        for line in lines:
            words = line.split(" ")
            operation = next((w.removeprefix("s3_") for w in words if w.startswith("s3_")), "")
            if bucket.uid in line and operation:
                found.append((operation, next((w for w in words if w.startswith(f"/{bucket.name}")), "")))
        return found

    def reads(self, bucket: Bucket) -> list[tuple[str, str]]:
        return [(operation, url) for operation, url in self.requests(bucket) if operation in READS]
