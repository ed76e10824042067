"""`trainyard checkpoints`: on a real S3 server and in directories, as a person calls it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from torch.distributed import checkpoint as dcp

from devcluster.s3 import S3Server
from tests.trainer.conftest import BUCKET
from tests.trainer.stored_runs import content, put_commit, put_fence, put_run, state
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.format import digest as digests
from trainyard.checkpoint.store_local import LocalStore
from trainyard.checkpoint.store_s3 import S3Store
from trainyard.checkpoint.stores import Store
from trainyard.cli.checkpoints_output import Lines, age, size
from trainyard.cli.main import main

RUN = "run-1"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=["s3", "folder"])
def store(request: pytest.FixtureRequest, prefix: str, tmp_path: Path, s3_credentials: None) -> Store:
    return S3Store(prefix, RUN) if request.param == "s3" else LocalStore((tmp_path / "runs").as_uri(), RUN)


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    return LocalStore((tmp_path / "runs").as_uri(), RUN)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["checkpoints", *words])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def damage(store: Store, key: str) -> None:
    """A bit, by somebody who does not keep checksums."""
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))


# ---- ls


def test_ls_lists_the_newest_first(store: Store, call: Call) -> None:
    put_run(store.put, RUN)
    code, out, err = call("ls", store.uri)
    assert (code, err) == (0, "")
    title, head, *rows = out.splitlines()
    assert title == store.uri
    assert head.split() == ["step", "seq", "attempt", "age", "size", "world", "reason", "metrics", "state"]
    assert [row.split()[0] for row in rows] == ["30", "20", "10"]
    assert re.fullmatch(
        r"30\s+4\s+1\s+\d+d\s+[\d.]+ KiB\s+2\s+steps\s+val_loss=0.03333\s+committed", rows[0].strip()
    )
    assert call("ls", "-o", "table", "--all", store.uri)[1].count("fence") == 1


def test_ls_of_a_parent_lists_its_runs(store: Store, call: Call) -> None:
    put_run(store.put, RUN, steps=(1,))
    parent = store.uri.rpartition("/")[0]
    other = S3Store(parent, "run-2") if parent.startswith("s3") else LocalStore(parent, "run-2")
    put_run(other.put, "run-2", steps=(2, 3))
    code, out, _ = call("ls", "-o", "json", f"{parent}/")
    assert code == 0
    found = {each["run"]: [row["step"] for row in each["checkpoints"]] for each in json.loads(out)}
    assert found == {RUN: [1], "run-2": [3, 2]}
    code, _, err = call("show", parent)
    assert code == 78
    assert "is not a run, but has these: run-1, run-2; name one" in err


def test_a_plain_path_is_a_place_and_shows_what_is_missing(
    folder: LocalStore, call: Call, tmp_path: Path
) -> None:
    records = put_run(folder.put, RUN)
    path = str(tmp_path / "runs" / RUN)
    folder.delete([records[2].shards[1].key])
    folder.put("commits/00000005.json", b"{}")
    code, out, err = call("ls", path)
    assert code == 0
    assert re.search(
        r"20 .* damaged: data/step-0+20/a000001/shard-00001-of-00002.safetensors: is missing", out
    )
    assert "1 unreadable records; --all shows them" in err
    assert "unreadable: commits/00000005.json" in call("ls", "--all", path)[1]


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [
        ("s3://no-such-bucket/x/y", 78, "bucket 'no-such-bucket' does not exist"),
        (f"s3://{BUCKET}/nothing-here", 78, "no checkpoints: there is no commits/ folder"),
        ("/nowhere/at/all", 78, "no checkpoints: there is no commits/ folder"),
        ("https://example.org/x", 78, "is none of s3://bucket/prefix, file:///absolute/path and a path"),
    ],
)
def test_a_place_that_is_none(place: str, code: int, said: str, call: Call, s3_credentials: None) -> None:
    found, out, err = call("ls", place)
    assert (found, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_endpoint_and_region_can_be_said(
    s3: S3Server, prefix: str, call: Call, s3_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_run(S3Store(prefix, RUN).put, RUN, steps=(1,))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert call("ls", "--endpoint", s3.endpoint, "--region", "us-east-1", f"{prefix}/{RUN}")[0] == 0
    code, _, err = call("ls", "--endpoint", "ftp://x", f"{prefix}/{RUN}")
    assert code != 0
    assert "error: " in err


def test_help_has_examples_and_exit_codes(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert "trainyard checkpoints prune --keep 3" in out
    assert "exit codes: 0 all is well" in out
    for verb in ("ls", "verify", "show", "export", "prune"):
        code, out, _ = call(verb, "--help")
        assert code == 0
        assert f"trainyard checkpoints {verb}" in out.partition("examples:")[2]
    assert call("frobnicate", "x")[0] == 2
    assert call("prune", "x")[0] == 2
    assert call("prune", "--keep", "0", "x")[0] == 2
    assert call("prune", "--keep", "2", "--keep-best", "loss:least:1", "x")[0] == 2


# ---- verify


def test_verify_finds_all_sound(store: Store, call: Call) -> None:
    put_run(store.put, RUN)
    for more in ((), ("--full",)):
        code, out, _ = call("verify", *more, store.uri)
        assert code == 0
        assert out.splitlines()[-1] == "3 of 3 checkpoints sound"
    assert "every byte" in out
    code, out, _ = call("verify", "--step", "20", store.uri)
    assert (code, out.count("sound (")) == (0, 1)


def test_the_quick_check_asks_the_server_for_its_checksums(
    prefix: str, s3_credentials: None, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of objects in one part, and in several. A bit that is flipped behind a matching size is seen without reading."""
    monkeypatch.setattr(digests, "PART", 5 << 20)
    store = S3Store(prefix, RUN)

    def put(key: str, data: bytes) -> None:
        path = tmp_path / "shard"
        path.write_bytes(data)
        if key.endswith(".safetensors"):
            store.put_parts(key, path, digests.part_size(len(data)))
        else:
            store.put(key, data)

    put_commit(put, RUN, step=1, seq=1)
    large = {"state_dict": {"w": torch.arange(3 << 20)}}
    put_commit(put, RUN, large, step=2, seq=2)
    code, out, _ = call("verify", store.uri)
    assert (code, out.count("the server's checksums (1 of 1)")) == (0, 2), out
    record = CommitLog(store, RUN).refresh()[-1]
    damage(store, record.shards[0].key)
    code, out, _ = call("verify", store.uri)
    assert code == 1
    assert "is not that of its commit" in out


def test_a_flipped_bit_needs_the_full_check_in_a_directory(folder: LocalStore, call: Call) -> None:
    records = put_run(folder.put, RUN)
    damage(folder, records[2].shards[1].key)
    assert call("verify", folder.uri)[0] == 0
    code, out, _ = call("verify", "--full", folder.uri)
    assert code == 1
    assert "step 20 (seq 3" in out
    assert f"{records[2].shards[1].key}: part 0 (bytes 0 to {records[2].shards[1].size}) does not have" in out
    assert out.splitlines()[-1] == "2 of 3 checkpoints sound"
    code, out, _ = call("verify", "--full", "-o", "json", folder.uri)
    (report,) = json.loads(out)
    assert (code, report["sound"]) == (1, False)
    assert [c["sound"] for c in report["checkpoints"]] == [True, False, True]


def test_what_is_missing_cut_off_or_in_the_wrong_place_is_named(folder: LocalStore, call: Call) -> None:
    records = put_run(folder.put, RUN, steps=(10, 20, 30, 40))
    (one, two, three, four) = (r.shards[0].key for r in records[1:])
    folder.delete([one])
    folder.put(two, folder.get(two)[:-3])
    folder.put(three.replace(".safetensors", ".json"), b"{}")
    folder.put(records[4].shards[1].key, folder.get(four)[: records[4].shards[1].size])
    for more, all_damaged in (((), False), (("--full",), True)):
        code, out, _ = call("verify", *more, folder.uri)
        assert code == 1
        assert f"{one}: is missing" in out
        assert re.search(f"{two}: (has|part|ends)|{two}: ends", out)
        assert "descriptor of" in out
        assert ("0 of 4" in out) == all_damaged
    code, _, err = call("show", "--step", "10", folder.uri)
    assert code == 1
    assert f"{one}: is missing" in err


def test_tensors_that_are_not_whole_are_found_by_the_full_check(folder: LocalStore, call: Call) -> None:
    tree = {"state_dict": {"w": {"$tensor": ["checkpoint.state_dict.w", "F32", [4, 2]]}}}
    put_commit(folder.put, RUN, step=1, seq=1, files=[content([], {"checkpoint": tree, "rank": {}})])
    assert call("verify", folder.uri)[0] == 0
    code, out, _ = call("verify", "--full", folder.uri)
    assert code == 1
    assert "checkpoint.state_dict.w: its 0 pieces are not the whole of it" in out


def test_orphans_and_unfinished_uploads_are_named(
    s3: S3Server, prefix: str, s3_credentials: None, call: Call
) -> None:
    store = S3Store(prefix, RUN)
    put_run(store.put, RUN)
    store.put("data/step-000000000007/a000000/shard-00000-of-00001.safetensors", b"dead")
    store.put("data/step-000000000040/a000001/shard-00000-of-00002.safetensors", b"young")
    client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
    key = f"{prefix.removeprefix(f's3://{BUCKET}/')}/{RUN}/data/step-000000000007/a000000/x.safetensors"
    client.create_multipart_upload(Bucket=BUCKET, Key=key)
    code, out, _ = call("verify", store.uri)
    assert code == 0
    assert "data/step-000000000007/a000000/: 1 objects, 4 B: orphans" in out
    assert "data/step-000000000040/a000001/: 1 objects, 5 B: a save under way" in out
    assert "data/step-000000000007/a000000/x.safetensors: an upload that was begun" in out


# ---- show


def test_show_tells_record_tensors_and_values(store: Store, call: Call) -> None:
    put_run(store.put, RUN, world=3)
    code, out, err = call("show", f"{store.uri}/commits/00000003.json")
    assert (code, err) == (0, "")
    assert re.search(r"^step +20$", out, re.M)
    assert re.search(r"^world size +3$", out, re.M)
    assert re.search(r"^checkpoint.state_dict.net.weight +float32 +8x3 +3 +96 B$", out, re.M)
    assert re.search(r"^checkpoint.state_dict.steps +int64 +scalar +1 +8 B$", out, re.M)
    assert re.search(r"^optimizer_states.0.param_groups.0.lr +0.1$", out, re.M)
    assert re.search(r"^odd +inf$", out, re.M)
    assert re.search(r"^pair +\(1, 'two'\)$", out, re.M)
    code, out, _ = call("show", "-o", "json", "--seq", "2", store.uri)
    shown = json.loads(out)
    assert shown["record"]["step"] == 10
    assert {t["name"]: t["pieces"] for t in shown["tensors"]}["rank-00002.rng"] == 1
    assert shown["values"]["global_step"] == "10"
    code, _, err = call("show", "--step", "11", store.uri)
    assert code == 78
    assert "no checkpoint of step 11; there are: 30, 20, 10" in err


def test_sparse_tensors_and_odd_keys_can_be_shown(folder: LocalStore, call: Call) -> None:
    odd = {
        1: "x",
        "$y": 2,
        "s": torch.eye(3).to_sparse(),
        "c": torch.ones(2, dtype=torch.complex128),
        "empty": {},
    }
    put_commit(folder.put, RUN, {"state_dict": {}, "odd": odd}, step=1, seq=1)
    code, out, _ = call("show", folder.uri)
    assert code == 0
    assert re.search(r"^odd.1 +'x'$", out, re.M)
    assert re.search(r"^odd.\$y +2$", out, re.M)


# ---- export


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert type(found) is type(wanted)
        for each in zip(found, wanted, strict=True):
            same(*each)
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


def test_export_to_all_formats(store: Store, call: Call, tmp_path: Path) -> None:
    put_run(store.put, RUN, world=3)
    wanted = state(20)
    code, out, _ = call("export", "--step", "20", store.uri, str(tmp_path / "a.ckpt"))
    assert (code, out) == (0, f"{tmp_path / 'a.ckpt'}: step 20 of {store.uri} as ckpt\n")
    same(torch.load(tmp_path / "a.ckpt", weights_only=True), wanted)

    assert call("export", "--step", "20", store.uri, str(tmp_path / "new" / "a.pt"))[0] == 0
    same(torch.load(tmp_path / "new" / "a.pt", weights_only=True), wanted["state_dict"])

    safetensors = pytest.importorskip("safetensors.torch")
    assert call("export", "--step", "20", store.uri, str(tmp_path / "a.safetensors"))[0] == 0
    same(safetensors.load_file(tmp_path / "a.safetensors"), wanted["state_dict"])

    code, _, _ = call("export", "--to", "dcp", "--step", "20", store.uri, str(tmp_path / "folder"))
    assert code == 0
    mine = {"checkpoint": {"state_dict": {n: torch.zeros_like(t) for n, t in wanted["state_dict"].items()}}}
    dcp.load(mine, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "folder")))
    same(mine["checkpoint"]["state_dict"], wanted["state_dict"])
    left = {p.name for p in tmp_path.iterdir()} - {"runs"}
    assert left == {"a.ckpt", "new", "a.safetensors", "folder"}, "no temporary file stays"


def test_all_kinds_of_tensors_survive_an_export(folder: LocalStore, call: Call, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weight = torch.randn(6, 4)
    weights = {
        "half": weight.to(torch.bfloat16), "bytes": torch.arange(7, dtype=torch.uint8), "flags": weight > 0,
        "none": torch.zeros(0, 3), "one": torch.tensor(1.5, dtype=torch.float64), "long": torch.arange(5),
        "tied": weight, "twin": weight,
    }  # fmt: skip
    whole = {
        "state_dict": weights,
        "sparse": torch.eye(3).to_sparse(),
        "wide": torch.ones(2, dtype=torch.complex128),
    }
    put_commit(folder.put, RUN, whole, step=1, seq=1, world=2)
    assert call("export", folder.uri, str(tmp_path / "a.ckpt"))[0] == 0
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    same(found["state_dict"], weights)
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3))
    assert found["wide"].dtype == torch.complex128
    assert (tmp_path / "a.ckpt").stat().st_size < 20_000, "a tensor must not bring others along"
    assert call("export", folder.uri, str(tmp_path / "a.safetensors"))[0] == 0
    same(safetensors.load_file(tmp_path / "a.safetensors"), weights)


def test_a_checkpoint_of_the_trainer_gets_its_ranks(folder: LocalStore, call: Call, tmp_path: Path) -> None:
    put_commit(folder.put, RUN, state(1) | {"trainyard": {"format": 2}}, step=1, seq=1, world=2)
    assert call("export", folder.uri, str(tmp_path / "a.ckpt"))[0] == 0
    ranks = torch.load(tmp_path / "a.ckpt", weights_only=True)["trainyard"]["ranks"]
    same(ranks, [{"rng": torch.tensor([0]), "number": 0}, {"rng": torch.tensor([1]), "number": 1}])


@pytest.mark.parametrize("to", ["ckpt", "safetensors", "state-dict", "dcp"])
def test_damage_is_never_exported(folder: LocalStore, call: Call, tmp_path: Path, to: str) -> None:
    records = put_run(folder.put, RUN)
    damage(folder, records[-1].shards[0].key)
    output = tmp_path / "out"
    code, out, err = call("export", "--to", to, folder.uri, str(output))
    assert (code, out) == (1, "")
    assert "does not have the SHA-256 of its commit" in err
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


def test_more_tensors_than_bytes_are_refused_before_there_is_room_for_them(
    folder: LocalStore, call: Call, tmp_path: Path
) -> None:
    tree = {"state_dict": {"w": {"$tensor": ["checkpoint.state_dict.w", "F32", [1 << 40]]}}}
    put_commit(folder.put, RUN, step=1, seq=1, files=[content([], {"checkpoint": tree, "rank": {}})])
    for to in ("ckpt", "safetensors", "state-dict"):
        code, _, err = call("export", "--to", to, folder.uri, str(tmp_path / "out"))
        assert code == 1
        assert "are larger than its" in err
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


def test_a_folder_with_something_in_it_is_left_alone(folder: LocalStore, call: Call, tmp_path: Path) -> None:
    put_run(folder.put, RUN)
    code, _, err = call("export", "--to", "dcp", folder.uri, str(tmp_path / "runs"))
    assert code == 78
    assert "exists, and is no empty folder" in err
    assert call("export", folder.uri, str(tmp_path / "runs"))[0] == 1


# ---- prune


def steps(store: Store) -> list[int]:
    return [r.step for r in CommitLog(store, RUN).refresh() if r.kind == "commit"]


def test_prune_keeps_the_newest_and_the_best(store: Store, call: Call) -> None:
    losses = {10: 0.5, 20: 0.1, 30: 0.3, 40: 0.4, 50: 0.6}
    put_fence(store.put, RUN, seq=1, attempt=1)
    for seq, (step, loss) in enumerate(losses.items(), 2):
        put_commit(store.put, RUN, step=step, seq=seq, metrics={"val_loss": loss})
    store.put("data/step-000000000015/a000000/shard-00000-of-00001.safetensors", b"dead")
    words = ("prune", "--keep", "2", "--keep-best", "val_loss:min:1", store.uri)
    code, out, _ = call(*words, "--dry-run")
    assert code == 0
    assert out.splitlines() == [
        "checkpoint of step 30 (seq 4)", "checkpoint of step 10 (seq 2)",
        "orphan data/step-000000000015/a000000/shard-00000-of-00001.safetensors",
        "kept: step 50, step 40, step 20",
    ]  # fmt: skip
    assert steps(store) == list(losses)

    code, _, err = call(*words)
    assert code == 1
    assert "--yes says that you mean it" in err
    assert steps(store) == list(losses)

    code, out, _ = call(*words, "--yes")
    assert code == 0
    assert out.splitlines()[-1] == "deleted 7 objects"
    assert steps(store) == [20, 40, 50]
    assert {key.split("/")[1] for key in store.list("data/")} == {f"step-{n:012d}" for n in (20, 40, 50)}
    assert call("verify", "--full", store.uri)[0] == 0
    code, out, _ = call(*words)
    assert (code, out) == (0, "kept: step 50, step 40, step 20\n")


def test_prune_never_leaves_fewer_than_two(folder: LocalStore, call: Call) -> None:
    put_run(folder.put, RUN)
    code, out, _ = call("prune", "--keep", "1", "--yes", "-o", "json", folder.uri)
    assert code == 0
    assert json.loads(out)["checkpoints"] == [{"seq": 2, "step": 10}]
    assert steps(folder) == [20, 30]


# ---- what people see


def test_sizes_and_ages() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1_610_612_736)] == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB"]
    assert [age(n) for n in (-5, 90, 600, 10_000, 10**6)] == ["0s", "90s", "10m", "3h", "12d"]


def test_long_work_says_where_it_is_now_and_then() -> None:
    now: list[float] = [0.0]
    said: list[str] = []
    lines = Lines(clock=lambda: now[0], write=said.append)
    lines.begin("step 3", 10 << 20)
    for _ in range(10):
        now[0] += 1.0
        lines.advance(1 << 20)
    lines.end()
    assert said == [
        "step 3: 5.0 MiB of 10.0 MiB (50 %), 1.0 MiB/s", "step 3: 10.0 MiB of 10.0 MiB (100 %), 1.0 MiB/s",
    ]  # fmt: skip
