"""The bucket as it is used, and what is said when it cannot be."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from devcluster.s3 import S3Server
from tests.trainer.conftest import BUCKET
from tests.trainer.forkhost import ROOT, Host
from tests.trainer.test_resume_exact import DIGITS, SMALL, wait_for_step, weights
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.errors import NotFound, ShardInvalid, StoreUnavailable
from trainyard.checkpoint.format.digest import PART, digest, spans, tree_hash
from trainyard.checkpoint.store_s3 import S3Store
from trainyard_api.checkpoints import Record, commits_newest_first


@pytest.fixture
def store(prefix: str, s3_credentials: None) -> S3Store:
    return S3Store(prefix, "run-1")


def test_the_verbs(store: S3Store, tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(b"0123456789" * 300_000)
    assert store.put_parts("data/a/shard", file, PART) == [digest(file.read_bytes())]
    store.put("data/a/shard.json", b"{}")
    store.put("data/b", b"x")
    assert store.list("data/a/") == ["data/a/shard", "data/a/shard.json"]
    sizes = {entry.key: entry.size for entry in store.listing("data/")}
    assert sizes == {"data/a/shard": 3_000_000, "data/a/shard.json": 2, "data/b": 1}
    assert all(abs(entry.modified - time.time()) < 60 for entry in store.listing("data/"))
    assert store.get("data/a/shard") == file.read_bytes()
    with pytest.raises(ShardInvalid, match="larger than 1000 bytes"):
        store.get("data/a/shard", limit=1000)
    assert b"".join(store.read("data/b")) == b"x"
    store.delete(["data/a/shard", "data/a/shard.json", "data/never"])
    assert store.list("data/") == ["data/b"]
    with pytest.raises(NotFound, match="data/a/shard"):
        store.get("data/a/shard")


def test_ranges_land_in_the_buffer_and_an_object_that_is_too_short_is_told_from_a_broken_connection(
    store: S3Store,
) -> None:
    content = bytes(range(256)) * 10_000
    store.put("data/x", content)
    buffer = bytearray(1_500_000)
    store.read_into("data/x", 1_000_001, memoryview(buffer))
    assert buffer == content[1_000_001:2_500_001]
    store.read_into("data/x", 0, memoryview(whole := bytearray(len(content))))
    assert whole == content
    with pytest.raises(ShardInvalid, match="has 2560000 bytes, not 2560001"):
        store.read_into("data/x", 1_060_001, memoryview(buffer))
    with pytest.raises(ShardInvalid, match="ends before byte 9000000"):
        store.read_into("data/x", 9_000_000, memoryview(buffer))
    with pytest.raises(NotFound):
        store.read_into("data/none", 0, memoryview(buffer))


def test_a_large_shard_goes_in_parts_and_the_server_keeps_the_same_checksum_as_the_commit(
    store: S3Store, tmp_path: Path
) -> None:
    file = tmp_path / "shard"
    with file.open("wb") as out:
        for number in range(70):
            out.write(bytes([number]) * (1 << 20))
    content = file.read_bytes()
    digests = store.put_parts("data/large", file, PART)
    assert digests == [digest(content[begin:end]) for begin, end in spans(len(content), PART)]
    assert b"".join(store.read("data/large")) == content
    head = boto3.client("s3").head_object(
        Bucket=BUCKET, Key=f"{store.uri.split('/', 3)[3]}/data/large", ChecksumMode="ENABLED"
    )
    assert head["ChecksumSHA256"] == f"{base64.b64encode(bytes.fromhex(tree_hash(digests))).decode()}-5"
    assert store.leftovers() == []


def test_what_changed_after_it_was_hashed_is_refused_by_the_server(store: S3Store) -> None:
    with pytest.raises(StoreUnavailable, match=r"BadDigest|SHA256Mismatch"), store._request("data/x"):
        store._put("data/x", memoryview(b"changed"), digest(b"original"))
    assert store.list("data/") == []


def test_an_unfinished_upload_is_found_and_freed(store: S3Store) -> None:
    key = f"{store.uri.split('/', 3)[3]}/data/step-000000000010/a000001/x"
    client = boto3.client("s3")
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
    client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * (5 << 20))
    (found,) = store.leftovers("data/")
    assert (found.key, found.upload_id) == ("data/step-000000000010/a000001/x", upload)
    assert abs(found.begun - time.time()) < 60
    store.abort(found)
    assert store.leftovers() == []
    store.abort(found)


def test_the_server_is_found_to_honour_conditions_by_one_object(store: S3Store) -> None:
    assert store.conditional
    assert S3Store(store.uri, "").conditional
    assert store.list("") == ["probe/conditional"]


def test_one_of_sixteen_wins_a_conditional_create(store: S3Store) -> None:
    start = threading.Barrier(16)
    won: list[int] = []

    def create(number: int) -> None:
        start.wait(20)
        if store.create("commits/00000001.json", f"{number}".encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1
    assert store.get("commits/00000001.json") == f"{won[0]}".encode()


def test_fences_hold_on_the_real_server(store: S3Store) -> None:
    def record(kind: str, attempt: int) -> Record:
        return Record(kind=kind, seq=0, run="run-1", attempt=attempt, step=attempt, time=0.0)

    old, new = CommitLog(store, "run-1"), CommitLog(store, "run-1")
    old.append(record("fence", 1))
    old.refresh()
    new.append(record("fence", 2))
    assert old.try_append(record("commit", 1)) is None
    assert [r.attempt for r in old.records] == [1, 2]


# ---- what a user reads when it does not work: all ranks end, soon, with one line and the right code


def one_line(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("trainyard: ")]
    assert "Traceback" not in output
    return line


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"TRAINYARD_CHECKPOINT_URI": "s3://no-such-bucket/x"}, 78, "bucket 'no-such-bucket' does not exist"),
        ({"AWS_ACCESS_KEY_ID": "somebody"}, 78, "refuses the S3 credentials"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 78, "refuses the S3 credentials"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"},
            78,
            "no S3 credentials: set AWS_ACCESS_KEY_ID",
        ),
    ],
    ids=["missing bucket", "unknown key", "wrong secret", "no credentials"],
)
def test_a_bucket_that_cannot_be_used_is_an_error_of_configuration(
    host: Host, run_env: dict[str, str], change: dict[str, str], code: int, said: str
) -> None:
    ranks = host.run([DIGITS, *SMALL], world=2, env={**run_env, **change}, seconds=30)
    assert [r.code for r in ranks] == [code, code]
    for rank in ranks:
        assert said in one_line(rank.output)
        assert "trainyard-secret" not in rank.output


def test_a_dead_endpoint_is_worth_another_try(host: Host, run_env: dict[str, str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        begin = time.monotonic()
        ranks = host.run(
            [DIGITS, *SMALL], world=2, env={**run_env, "TRAINYARD_CHECKPOINT_ENDPOINT": endpoint}, seconds=40
        )
        assert time.monotonic() - begin > 5, "it must try for a while"
    assert [r.code for r in ranks] == [1, 1]
    for rank in ranks:
        assert f"{endpoint} cannot be reached" in one_line(rank.output)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[S3Server]:
    """One that a test may stop."""
    with S3Server(tmp_path / "own-s3") as server:
        server.make_bucket(BUCKET)
        yield server


def test_training_goes_on_while_the_server_is_away_and_nothing_is_lost(
    host: Host, run_env: dict[str, str], own_server: S3Server, s3_credentials: None, tmp_path: Path
) -> None:
    env = {**run_env, "TRAINYARD_CHECKPOINT_ENDPOINT": own_server.endpoint}
    log = tmp_path / "samples"
    (rank,) = host.start([DIGITS, *SMALL, "--sample-log", str(log)], env=env)
    wait_for_step(log / "rank-0.jsonl", 8, rank)
    own_server.stop()
    wait_for_step(log / "rank-0.jsonl", 40, rank)
    assert rank.code is None
    own_server.start()
    assert host.wait([rank], 60) == [0]
    store = S3Store(run_env["TRAINYARD_CHECKPOINT_URI"], "run-1", endpoint=own_server.endpoint)
    assert commits_newest_first(CommitLog(store, "run-1").refresh())[0].step == 48


def test_another_model_is_refused_with_the_shapes(host: Host, run_env: dict[str, str]) -> None:
    argv = [DIGITS, "--epochs", "1", "--batch-size", "200"]
    assert [r.code for r in host.run([*argv, "--hidden", "8"], env=run_env)] == [0]
    (rank,) = host.run([*argv, "--hidden", "16"], env={**run_env, "TRAINYARD_ATTEMPT": "2"})
    assert rank.code == 78
    line = one_line(rank.output)
    assert "'position' has shape (8, 8) in the checkpoint and (8, 16) in the model" in line
    assert "start a new run" in line


def test_a_stale_attempt_ends_with_its_own_code(host: Host, run_env: dict[str, str]) -> None:
    argv = [DIGITS, "--epochs", "1", "--batch-size", "200", "--hidden", "8"]
    assert [r.code for r in host.run(argv, env={**run_env, "TRAINYARD_ATTEMPT": "5"})] == [0]
    (rank,) = host.run(argv, env={**run_env, "TRAINYARD_ATTEMPT": "4"})
    assert rank.code == 79
    assert "attempt 5 has begun; attempt 4 may not write" in one_line(rank.output)


def test_a_staged_save_is_committed_though_its_worker_was_killed(
    host: Host, run_env: dict[str, str], tmp_path: Path, s3_credentials: None
) -> None:
    """The pod's uploader outlives the worker. The store is slow to come, so that the save is surely under way."""
    import os
    import subprocess
    import sys

    from tests.trainer.forkhost import PYTHONPATH

    own = S3Server(tmp_path / "late-s3")
    with own:
        own.make_bucket(BUCKET)
        env = {
            **run_env, "TRAINYARD_CHECKPOINT_ENDPOINT": own.endpoint, "TRAINYARD_RUNTIME_DIR": str(tmp_path / "rt"),
            "TRAINYARD_UPLOADER_SOCKET": str(tmp_path / "u.sock"), "TRAINYARD_CHECKPOINT_EVERY_STEPS": "10",
        }  # fmt: skip
        uploader = subprocess.Popen(
            [sys.executable, "-m", "trainyard.checkpoint.uploader", "--socket", env["TRAINYARD_UPLOADER_SOCKET"],
             "--staging", str(tmp_path / "rt/staging")],
            env={**os.environ, **env, "PYTHONPATH": PYTHONPATH},
        )  # fmt: skip
        try:
            log = tmp_path / "samples"
            (rank,) = host.start([DIGITS, *SMALL, "--sample-log", str(log)], env=env)
            wait_for_step(log / "rank-0.jsonl", 5, rank)
            own.stop()
            wait_for_step(log / "rank-0.jsonl", 12, rank)  # step 10 is staged, and cannot be uploaded
            staged = list((tmp_path / "rt/staging").rglob("*.safetensors"))
            rank.kill()
            host.wait([rank])
            assert [p.parent.parent.name for p in staged] == ["step-000000000010"]
            own.start()
            (again,) = host.run([DIGITS, *SMALL], env={**env, "TRAINYARD_ATTEMPT": "2"})
            assert "resumed at step 10 from" in again.output
            unbroken = host.run([DIGITS, *SMALL], env={**run_env, "TRAINYARD_RUN_UID": "unbroken"})
            assert weights([again]) == weights(unbroken)
        finally:
            uploader.terminate()
            assert uploader.wait(30) == 0


def test_the_example_runs_from_the_folder_of_its_readme(host: Host, tmp_path: Path) -> None:
    (rank,) = host.run(
        [str(ROOT / "examples/textgen/train.py"), "--epochs", "1", "--hidden", "8", "--batch-size", "64",
         "--checkpoint", (tmp_path / "ck").as_uri()],
    )  # fmt: skip
    assert rank.code == 0, rank.output
    assert "final weights sha256=" in rank.output
