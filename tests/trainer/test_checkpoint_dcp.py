"""Plain torch.distributed.checkpoint on our stores: save at n ranks, load at m, in S3 and in a directory."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from devcluster.s3 import S3Server
from tests.trainer.dcp_ranks import RUN, whole_state
from tests.trainer.forkhost import Host
from tests.trainer.stored_runs import put_commit, state
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.dcp import RunStorageReader, RunStorageWriter
from trainyard.checkpoint.errors import CheckpointConfigError
from trainyard.checkpoint.store_local import LocalStore
from trainyard.checkpoint.store_s3 import S3Store
from trainyard_api.checkpoints import Record

SCRIPT = str(Path(__file__).with_name("dcp_ranks.py"))

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(params=["s3", "folder"])
def place(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> str:
    return prefix if request.param == "s3" else tmp_path.as_uri()


@pytest.fixture
def env(s3: S3Server, s3_credentials: None) -> dict[str, str]:
    return {**s3.environment, "TRAINYARD_CHECKPOINT_ENDPOINT": s3.endpoint}


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list | tuple):
        return type(found) is type(wanted) and all(same(a, b) for a, b in zip(found, wanted, strict=True))
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and torch.equal(found, wanted)
    if isinstance(wanted, float) and math.isnan(wanted):
        return math.isnan(found)
    return type(found) is type(wanted) and bool(found == wanted)


def run(host: Host, verb: str, place: str, tmp_path: Path, env: dict[str, str], world: int) -> Any:
    output = tmp_path / f"{verb}-{world}"
    ranks = host.run([SCRIPT, verb, place, str(output)], world=world, env=env, seconds=90)
    assert [r.code for r in ranks] == [0] * world, "\n".join(r.output[-3000:] for r in ranks)
    return torch.load(output) if verb == "load" else None


def test_saved_at_two_ranks_loaded_at_one_two_and_three(
    host: Host, place: str, tmp_path: Path, env: dict[str, str], s3: S3Server
) -> None:
    run(host, "save", place, tmp_path, env, 2)
    store = S3Store(place, RUN, endpoint=s3.endpoint) if place.startswith("s3") else LocalStore(place, RUN)
    records = CommitLog(store, RUN).refresh()
    assert [(r.kind, r.step, r.attempt, r.world_size) for r in records] == [
        ("fence", 0, 1, 0), ("commit", 5, 1, 2), ("commit", 6, 1, 2),
    ]  # fmt: skip
    for world in (1, 2, 3):
        found = run(host, "load", place, tmp_path, env, world)
        assert found["step"] == 6
        assert same(found["state"], whole_state()), found
    # Each tensor is there once, though both ranks had the plain and the replicated ones.
    sizes = sum(s.size for s in records[1].shards)
    numbers = sum(t.numel() * t.element_size() for t in whole_state()["model"].values())
    assert sizes < numbers + 8 + 2 * 4096


def test_a_save_in_the_background_holds_what_was_there_when_it_began(
    host: Host, place: str, tmp_path: Path, env: dict[str, str]
) -> None:
    run(host, "async", place, tmp_path, env, 2)
    found = run(host, "load", place, tmp_path, env, 1)
    assert found["step"] == 8
    assert same(found["state"], whole_state())


def test_a_stock_reader_loads_what_was_written(host: Host, tmp_path: Path, env: dict[str, str]) -> None:
    pytest.importorskip("safetensors")
    run(host, "save", tmp_path.as_uri(), tmp_path, env, 2)
    (folder,) = (tmp_path / RUN).glob("data/step-000000000005/*")
    model = whole_state()["model"]
    mine = {"model": {name: torch.full_like(t, 99) for name, t in model.items()}}
    dcp.load(mine, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    assert same(mine["model"], model)


def test_a_checkpoint_of_the_engine_is_read_by_its_names(tmp_path: Path) -> None:
    store = LocalStore(tmp_path.as_uri(), RUN)
    put_commit(store.put, RUN, step=4, seq=1, world=3)
    mine = {
        "checkpoint": {"state_dict": {"net.weight": torch.zeros(8, 3)}, "global_step": 0, "odd": 0.0},
        "rank-00002": {"number": None, "rng": torch.zeros(1, dtype=torch.int64)},
    }
    dcp.load(mine, storage_reader=RunStorageReader(tmp_path.as_uri(), RUN))
    assert torch.equal(mine["checkpoint"]["state_dict"]["net.weight"], state(4)["state_dict"]["net.weight"])
    assert (mine["checkpoint"]["global_step"], mine["checkpoint"]["odd"]) == (4, float("inf"))
    assert mine["rank-00002"] == {"number": 2, "rng": torch.tensor([2])}


def test_a_state_is_rebuilt_from_the_metadata_alone(tmp_path: Path) -> None:
    wanted = {"a": {"w": torch.ones(2)}, "layers": [{"b": torch.zeros(3)}, {"b": torch.ones(3)}]}
    dcp.save(wanted, storage_writer=RunStorageWriter(tmp_path.as_uri(), RUN))
    found: dict[str, Any] = {}
    # As torch's own dcp_to_torch_save does.
    _load_state_dict(
        found, RunStorageReader(tmp_path.as_uri(), RUN), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    assert same(found, wanted)


class Canary:
    """Unpickled, it would say so."""

    def __reduce__(self) -> Any:
        return (print, ("ran",))


def refusal(call: Any) -> str:
    with pytest.raises(dcp.CheckpointException) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Canary(), "bad: a tests.trainer.test_checkpoint_dcp.Canary cannot be in a checkpoint"),
        (("pair", torch.ones(2)), "bad.1: a tensor in a tuple"),
        (torch.ones(2).to_sparse(), "bad: a torch.sparse_coo tensor cannot be in a checkpoint"),
        (
            torch.ones(2, dtype=torch.complex128),
            "bad: a tensor of torch.complex128 cannot be in a checkpoint",
        ),
        (torch.ones(2, device="meta"), "bad: a meta tensor"),
    ],
    ids=["object", "tensor in a tuple", "sparse", "complex128", "meta"],
)
def test_what_cannot_be_saved_is_refused_by_name_and_nothing_is_committed(
    tmp_path: Path, value: Any, said: str
) -> None:
    writer = RunStorageWriter(tmp_path.as_uri(), RUN)
    assert said in refusal(lambda: dcp.save({"ok": 1, "bad": value}, storage_writer=writer))
    writer.close()
    assert [r.kind for r in CommitLog(LocalStore(tmp_path.as_uri(), RUN), RUN).refresh()] == ["fence"]


def test_nothing_is_pickled_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("pickled")

    for module, names in {torch: ("save", "load"), pickle: ("dumps", "loads", "dump", "load")}.items():
        for name in names:
            monkeypatch.setattr(module, name, never)
    writer = RunStorageWriter(tmp_path.as_uri(), RUN)
    dcp.save({"epoch": 3, "w": torch.ones(2)}, storage_writer=writer)
    mine: dict[str, Any] = {"epoch": 0, "w": torch.zeros(2)}
    dcp.load(mine, storage_reader=RunStorageReader(tmp_path.as_uri(), RUN))
    assert same(mine, {"epoch": 3, "w": torch.ones(2)})


def test_planners_with_their_own_bytes_are_refused(tmp_path: Path) -> None:
    class Saves(DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            return object

    class Loads(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            raise AssertionError

    uri = tmp_path.as_uri()
    writer = RunStorageWriter(uri, RUN)
    assert "Saves makes bytes of it" in refusal(
        lambda: dcp.save({"a": 1}, storage_writer=writer, planner=Saves())
    )
    caching = DefaultSavePlanner(enable_plan_caching=True)
    assert "plan_caching" in refusal(lambda: dcp.save({"a": 1}, storage_writer=writer, planner=caching))
    dcp.save({"a": 1}, storage_writer=writer)
    assert "Loads wants bytes" in refusal(
        lambda: dcp.load({"a": 0}, storage_reader=RunStorageReader(uri, RUN), planner=Loads())
    )


def test_an_older_writer_is_fenced_off_and_a_step_is_never_replaced(tmp_path: Path) -> None:
    uri = tmp_path.as_uri()
    old, new = RunStorageWriter(uri, RUN), RunStorageWriter(uri, RUN)
    dcp.save({"a": torch.zeros(1)}, checkpoint_id="1", storage_writer=old)
    assert "step 1 is saved already" in refusal(
        lambda: dcp.save({"a": torch.ones(1)}, checkpoint_id="1", storage_writer=old)
    )
    dcp.save({"a": torch.ones(1)}, checkpoint_id="2", storage_writer=new)
    assert "attempt 2 has begun; attempt 1 may not write" in refusal(
        lambda: dcp.save({"a": torch.zeros(1)}, checkpoint_id="3", storage_writer=old)
    )
    mine = {"a": torch.full((1,), 9.0)}
    dcp.load(mine, checkpoint_id="1", storage_reader=RunStorageReader(uri, RUN))
    assert mine["a"] == 0
    dcp.load(mine, storage_reader=RunStorageReader(uri, RUN))
    assert mine["a"] == 1
    with pytest.raises(CheckpointConfigError, match="the id of a checkpoint is its step"):
        dcp.save({"a": torch.zeros(1)}, checkpoint_id="../../x", storage_writer=new)


def test_old_commits_go_when_that_is_asked_for(tmp_path: Path) -> None:
    writer = RunStorageWriter(tmp_path.as_uri(), RUN, keep=2)
    for step in range(4):
        dcp.save({"a": torch.full((1,), float(step))}, checkpoint_id=str(step), storage_writer=writer)
    writer.close()
    records = CommitLog(LocalStore(tmp_path.as_uri(), RUN), RUN).refresh()
    assert [r.step for r in records if r.kind == "commit"] == [2, 3]
    assert len(list((tmp_path / RUN).rglob("*.safetensors"))) == 2


def test_damage_is_told_and_loads_nothing(tmp_path: Path) -> None:
    uri = tmp_path.as_uri()
    dcp.save({"a": torch.zeros(1000)}, storage_writer=RunStorageWriter(uri, RUN))
    (shard,) = (tmp_path / RUN).rglob("data/**/*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    mine = {"a": torch.ones(1000)}
    # DCP hides what a reader's metadata could not be read for behind an AssertionError of its own.
    assert "does not have the SHA-256 of its commit" in refusal(
        lambda: dcp.load(mine, storage_reader=RunStorageReader(uri, RUN))
    )
    assert torch.equal(mine["a"], torch.ones(1000))


def test_a_path_of_another_rank_cannot_lead_into_what_is_there(tmp_path: Path) -> None:
    """The skeleton of a rank's own values says where they belong, and is no more trusted than anything else."""
    from tests.trainer.stored_runs import content
    from trainyard.checkpoint.dcp_state import contents
    from trainyard.checkpoint.errors import ShardInvalid
    from trainyard.checkpoint.reader import CheckpointReader
    from trainyard.checkpoint.sources import StoreSource

    store = LocalStore(tmp_path.as_uri(), RUN)
    good: Any = [[["own", "x"], 3]]
    cases: dict[str, Any] = {
        "good": good, "into a value": [[["epoch", "x"], 1]], "over a value": [[["epoch"], 1]], "no list": {"a": 1},
        "no path": [[[], 1]], "odd": [[1]], "twice": good * 2,
    }  # fmt: skip
    for seq, (name, own) in enumerate(cases.items(), 1):
        files = [content([], {"checkpoint": {"epoch": 1}, "rank": [], "dcp": 1}), content([], {"rank": own})]
        record: Record = put_commit(store.put, RUN, step=seq, seq=seq, files=files)
        reader = CheckpointReader(record, [StoreSource(store)])
        if name == "good":
            assert contents(reader).values == {"epoch": 1, "own.x": 3}
            continue
        with pytest.raises(ShardInvalid, match="rank: "):
            contents(reader)
    assert json.loads(store.get("commits/00000001.json"))["kind"] == "commit"
