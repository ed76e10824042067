"""Deleting all checkpoints of a run: all of it, nothing else, and again after any interruption."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from devcluster.s3 import S3Server
from tests.trainer.conftest import BUCKET
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.delete import Unfinished, delete_all, main
from trainyard.checkpoint.stores import Store, open_store

RUN, OTHER = "run-1", "run-10"
KEYS = [
    "commits/00000001.json",
    "commits/00000002.json",
    "commits/00000010.json",
    "data/step-000000000010/a000001/shard-00000-of-00001.json",
    "data/step-000000000010/a000001/shard-00000-of-00001.safetensors",
    "probe/conditional",
]


@pytest.fixture(params=["s3", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/checkpoints"
    request.getfixturevalue("s3_credentials")
    return str(request.getfixturevalue("prefix"))


def filled(uri: str, run: str = RUN) -> Store:
    store = open_store(CheckpointConfig(uri=uri, run=run))
    for number, key in enumerate(KEYS):
        store.put(key, b"x" * number)
    return store


def environment(uri: str, **more: str) -> dict[str, str]:
    return {"TRAINYARD_CHECKPOINT_URI": uri, "TRAINYARD_RUN_UID": RUN, **more}


def last_words(told: Path) -> dict[str, str]:
    return dict(json.loads(told.read_text()))


def test_everything_of_the_run_goes_and_nothing_of_another(uri: str, tmp_path: Path) -> None:
    store, other = filled(uri), filled(uri, OTHER)
    told = tmp_path / "termination-log"
    told.touch()
    assert main([], environment(uri), told) == 0
    assert store.list("") == [] and other.list("") == KEYS
    assert last_words(told) == {"outcome": "deleted", "message": "6 objects, 15 bytes"}
    assert main([], environment(uri), told) == 0
    assert last_words(told) == {"outcome": "deleted", "message": "0 objects, 0 bytes"}
    if uri.startswith("file://"):
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [OTHER]


def test_unfinished_uploads_go_too(prefix: str, s3: S3Server, s3_credentials: None) -> None:
    import boto3

    store, other = filled(prefix), filled(prefix, OTHER)
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    for run in (RUN, OTHER):
        key = f"{prefix.removeprefix(f's3://{BUCKET}/')}/{run}/data/late"
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
        client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"y" * 1000)
    done = delete_all(store, seconds=30)
    assert (done.objects, done.uploads, done.trouble) == (6, 1, "")
    assert not store.leftovers() and len(other.leftovers()) == 1


class Interrupted(Exception):
    """The process is killed."""


class Watched:
    """A store that tells what is deleted, one key at a time, and ends after so many."""

    def __init__(self, store: Store, last: int = 10**6) -> None:
        self.store = store
        self.last = last
        self.deleted: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            if len(self.deleted) >= self.last:
                raise Interrupted
            self.store.delete([key])
            self.deleted.append(key)


@pytest.mark.parametrize("last", range(len(KEYS)))
def test_it_can_be_interrupted_after_any_object(uri: str, last: int) -> None:
    """What is left always has the newest record of the log."""
    store = filled(uri)
    with pytest.raises(Interrupted):
        delete_all(Watched(store, last), seconds=30)  # type: ignore[arg-type]
    left = store.list("")
    assert len(left) == len(KEYS) - last and "commits/00000010.json" in left
    assert delete_all(store, seconds=30).objects == len(left)
    assert store.list("") == []


def test_the_log_goes_last_and_its_newest_record_last_of_all(uri: str) -> None:
    watched = Watched(filled(uri))
    delete_all(watched, seconds=30)  # type: ignore[arg-type]
    assert watched.deleted[-3:] == KEYS[:3] and sorted(watched.deleted) == KEYS


def test_what_is_written_meanwhile_goes_too(uri: str) -> None:
    store = filled(uri)

    class Late(Watched):
        def delete(self, keys: Iterable[str]) -> None:
            super().delete(keys)
            if len(self.deleted) == len(KEYS):
                self.store.put("data/late", b"zombie")

    assert delete_all(Late(store), seconds=30).objects == len(KEYS) + 1  # type: ignore[arg-type]
    assert store.list("") == []


def test_it_ends_in_time_and_says_what_is_left(uri: str) -> None:
    ticks = itertools.count()
    with pytest.raises(Unfinished, match="0 objects, 0 bytes are deleted, 6 objects are left"):
        delete_all(filled(uri), seconds=3, clock=lambda: float(next(ticks)))


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, "TRAINYARD_RUN_UID must be set"),
        ({"TRAINYARD_CHECKPOINT_URI": "s3://bucket/p"}, "TRAINYARD_RUN_UID must be set"),
        ({"TRAINYARD_RUN_UID": RUN}, "TRAINYARD_RUN_UID must be set"),
        ({"TRAINYARD_CHECKPOINT_URI": "ftp://a", "TRAINYARD_RUN_UID": RUN}, "ftp://a"),
        ({"TRAINYARD_CHECKPOINT_URI": "s3://b/p", "TRAINYARD_RUN_UID": "../other"}, "not a plain name"),
    ],
)
def test_without_a_place_and_a_run_nothing_is_deleted(
    env: dict[str, str], words: str, tmp_path: Path
) -> None:
    told = tmp_path / "t"
    told.touch()
    assert main([], env, told) == 78
    assert last_words(told)["outcome"] == "failed" and words in last_words(told)["message"]


def test_a_bucket_that_is_not_there_is_said(s3: S3Server, s3_credentials: None, tmp_path: Path) -> None:
    told = tmp_path / "t"
    told.touch()
    assert main([], environment("s3://no-such-bucket/p"), told) == 78
    assert "no-such-bucket" in last_words(told)["message"]


def test_as_a_program(prefix: str, run_env: dict[str, str], s3_credentials: None) -> None:
    """As the pod runs it; torch, which takes seconds and hundreds of MiB, is not imported."""
    store = filled(prefix)
    watch = "import sys; sys.argv = ['delete']; from trainyard.checkpoint.delete import main; code = main(); "
    program = watch + "sys.exit(code or (99 if 'torch' in sys.modules else 0))"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), **run_env},
        capture_output=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert b"6 objects" in ran.stderr and store.list("") == []
