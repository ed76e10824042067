"""A real S3 server for the session, a prefix of its own for each test, and a host that forks ranks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.s3 import S3Server
from tests.trainer.forkhost import Host

BUCKET = "training"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3") / "data") as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("ranks"))
    yield host
    host.close()


@pytest.fixture(autouse=True)
def no_seed_from_before() -> Iterator[None]:
    """seed_everything leaves its seed in the environment, as Lightning's does."""
    for moment in ("before", "after"):
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name, None)
        if moment == "before":
            yield


@pytest.fixture
def prefix() -> str:
    """A checkpoint URI that no other test uses."""
    return f"s3://{BUCKET}/t{next(_numbers)}"


@pytest.fixture
def run_env(s3: S3Server, prefix: str) -> dict[str, str]:
    """What a TrainingRun gives its workers, without agent and uploader."""
    return {
        **{k: v for k, v in s3.environment.items() if k != "AWS_ENDPOINT_URL"},
        "TRAINYARD_CHECKPOINT_URI": prefix,
        "TRAINYARD_CHECKPOINT_ENDPOINT": s3.endpoint,
        "TRAINYARD_RUN_UID": "run-1",
        "TRAINYARD_CHECKPOINT_EVERY_STEPS": "3",
    }


@pytest.fixture
def s3_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """For stores that are opened in the test's own process."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def data_folder(s3: S3Server, prefix: str) -> Path:
    """Where the server keeps the objects of this test: for looking, and for damaging them."""
    return s3.data_dir / prefix.removeprefix("s3://")
