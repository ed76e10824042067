"""Saved by n ranks, each its own part; loaded by m, laid out in another way."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.forkhost import Host
from trainyard.checkpoint.format.shardfile import header_length, read_header
from trainyard.checkpoint.resume import newest
from trainyard.checkpoint.store_local import LocalStore

SCRIPT = str(Path(__file__).with_name("sharded_runs.py"))


def run(host: Host, folder: Path, uri: str, strategy: str, steps: int, world: int) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    ranks = host.run([SCRIPT, str(folder), uri, strategy, str(steps)], world=world, seconds=120)
    assert not any(rank.code for rank in ranks), "\n".join(rank.output[-3000:] for rank in ranks)
    if uri:
        assert all("resumed at step 7" in r.output for r in ranks[:1]) == (steps == 12)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def unbroken(host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    (found,) = run(host, tmp_path_factory.mktemp("unbroken"), "", "auto", 12, 1)
    return found["weights"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders with a checkpoint of step 7, in the middle of the second epoch; each is made once."""
    made: dict[tuple[str, int], Path] = {}

    def folder(strategy: str, world: int) -> Path:
        if (strategy, world) not in made:
            path = tmp_path_factory.mktemp(f"{strategy}-{world}")
            found = run(host, path, (path / "ck").as_uri(), strategy, 7, world)
            assert [r["gathered"] for r in found] == [0] * world, "a save gathers nothing"
            made[strategy, world] = path
        return made[strategy, world]

    return folder


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp", 2), ("fsdp", 2)), (("fsdp", 2), ("fsdp", 3)), (("fsdp", 3), ("fsdp", 2)), (("fsdp", 3), ("ddp", 2)),
        (("fsdp", 2), ("auto", 1)), (("ddp", 2), ("fsdp", 3)), (("ddp", 3), ("ddp", 2)), (("ddp", 2), ("auto", 1)),
        (("auto", 1), ("fsdp", 2)), (("auto", 1), ("ddp", 3)), (("hybrid", 4), ("fsdp", 2)), (("fsdp", 3), ("hybrid", 4)),
    ],
    ids=lambda side: "-".join(map(str, side)),
)  # fmt: skip
def test_any_layout_goes_on_as_any_other(
    host: Host, tmp_path: Path, saved: Any, unbroken: dict[str, torch.Tensor],
    before: tuple[str, int], after: tuple[str, int],
) -> None:  # fmt: skip
    copy_tree(saved(*before) / "ck", tmp_path / "ck")
    found = run(host, tmp_path / "after", (tmp_path / "ck").as_uri(), after[0], 12, after[1])
    assert [rank["step"] for rank in found] == [12] * after[1]
    assert found[0]["weights"].keys() == unbroken.keys()
    for name, value in unbroken.items():
        if "norm.running" not in name and name != "steps":  # of rank 0's batches
            torch.testing.assert_close(found[0]["weights"][name], value, atol=2e-6, rtol=0)
    assert int(found[0]["weights"]["steps"]) == int(unbroken["steps"]) == 12


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_each_rank_goes_on_with_buffers_of_its_own(
    host: Host, tmp_path: Path, saved: Any, strategy: str
) -> None:
    """Statistics of batches that only this rank has seen; an unbroken run has them, and validates with them."""
    copy_tree(saved(strategy, 2) / "ck", tmp_path / "ck")
    found = run(host, tmp_path / "after", (tmp_path / "ck").as_uri(), strategy, 12, 2)
    whole = run(host, tmp_path / "unbroken", "", strategy, 12, 2)
    for ours, theirs in zip(found, whole, strict=True):
        assert ours["buffers"].keys() == theirs["buffers"].keys()
        for name, value in theirs["buffers"].items():
            assert torch.equal(ours["buffers"][name], value), name
    name = "norm.running_mean"
    assert not torch.equal(found[0]["buffers"][name], found[1]["buffers"][name])


@pytest.mark.parametrize(("strategy", "world"), [("fsdp", 3), ("ddp", 3), ("hybrid", 4)])
def test_each_rank_writes_its_part_and_nothing_twice(saved: Any, strategy: str, world: int) -> None:
    store = LocalStore((saved(strategy, world) / "ck").as_uri(), "run-1")
    record, state, passed_over = newest(store, "run-1")
    assert (record.step, record.world_size, record.reason, passed_over) == (7, world, "end", [])
    pieces: dict[str, int] = {}
    written = []
    for shard in record.shards:
        data = store.get(shard.key)
        header = read_header(data[: header_length(data, len(data))], len(data))
        written.append(sum(e.box.numel for e in header.entries.values() if e.name.startswith("checkpoint.")))
        for entry in header.entries.values():
            pieces[entry.name] = pieces.get(entry.name, 0) + entry.box.numel
    tied = {"tied.weight"}
    for name, value in state.main["state_dict"].items():
        if name not in tied:
            assert pieces[f"checkpoint.state_dict.{name}"] == value.numel(), name
    assert "checkpoint.state_dict.tied.weight" not in pieces
    # Small tensors are not cut, so the balance is not perfect; but nobody writes it all.
    assert max(written) < sum(written), json.dumps(written)
    assert len({shard.key for shard in record.shards}) == world
    assert all(a.rank < b.rank for a, b in itertools.pairwise(record.shards))


def copy_tree(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".trainyard-*"))
