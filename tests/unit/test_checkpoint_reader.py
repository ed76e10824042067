"""Reading a commit: by boxes, verified, from the first source that has it whole."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.thread_peers import ThreadPeers, run_ranks
from trainyard.checkpoint import reader as reader_module
from trainyard.checkpoint.errors import NotFound, ShardInvalid
from trainyard.checkpoint.format import digest as digests
from trainyard.checkpoint.format.digest import Descriptor, digest, part_size, spans, tree_hash
from trainyard.checkpoint.format.geometry import Box
from trainyard.checkpoint.format.shardfile import Wanted, make_header
from trainyard.checkpoint.format.tree import flatten
from trainyard.checkpoint.loading import load_state
from trainyard.checkpoint.reader import CheckpointReader, Request
from trainyard.checkpoint.sources import FolderSource, descriptor_of
from trainyard_api.checkpoints import Record, Shard, shard_key

Piece = tuple[str, Box, torch.Tensor]
"""Name, which part of the whole, the whole."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "PART", 512)


def write(root: Path, shards: list[tuple[list[Piece], dict[str, Any]]]) -> Record:
    """A commit as an uploader leaves it, made by hand from the format's parts."""
    made = []
    for rank, (pieces, trees) in enumerate(shards):
        header = make_header(
            [Wanted(name=n, dtype=t.dtype, box=b, whole=tuple(t.shape)) for n, b, t in pieces], trees
        )
        data = bytearray(header.size)
        data[: len(header.raw)] = header.raw
        for name, box, tensor in pieces:
            entry = header.entries[name]
            cut = tensor[box.within(Box.whole(tuple(tensor.shape)))].contiguous()
            data[entry.begin : entry.end] = cut.reshape(-1).view(torch.uint8).numpy().tobytes()
        key = shard_key(7, 1, rank, len(shards))
        part = part_size(len(data))
        parts = [digest(bytes(data[a:b])) for a, b in spans(len(data), part)]
        shard = Shard(key=key, rank=rank, size=len(data), sha256=tree_hash(parts), part_size=part)
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        (root / descriptor_of(key)).write_text(json.dumps(Descriptor(shard=shard, parts=parts).to_json()))
        made.append(shard)
    return Record(
        kind="commit", seq=1, run="r", attempt=1, step=7, time=0.0, shards=made, world_size=len(made)
    )


def commit(root: Path, checkpoint: dict[str, Any], world: int = 1) -> Record:
    """All tensors cut into rows, one stretch for each rank."""
    tree, tensors = flatten(checkpoint)
    shards: list[tuple[list[Piece], dict[str, Any]]] = []
    for rank in range(world):
        own, _ = flatten({"number": rank}, f"rank-{rank:05d}")
        pieces: list[Piece] = []
        for name, tensor in tensors.items():
            if tensor.dim() == 0:
                if rank == 0:
                    pieces.append((name, Box.whole(()), tensor))
                continue
            rows = tensor.shape[0]
            begin, end = rows * rank // world, rows * (rank + 1) // world
            if end > begin:
                rest = tuple(tensor.shape[1:])
                pieces.append((name, Box((begin, *[0] * len(rest)), (end - begin, *rest)), tensor))
        shards.append((pieces, {"rank": own, **({"checkpoint": tree} if rank == 0 else {})}))
    return write(root, shards)


STATE = {
    "w": torch.arange(600, dtype=torch.float32).reshape(30, 20),
    "b": torch.tensor(3, dtype=torch.int64),
    "h": torch.randn(11).to(torch.bfloat16),
    "n": {"lr": 0.1, "betas": (0.9, 0.999)},
}


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_what_any_number_of_ranks_wrote_any_rank_loads_whole(tmp_path: Path, world: int) -> None:
    record = commit(tmp_path, STATE, world)
    state = load_state(CheckpointReader(record, [FolderSource(tmp_path)]), 1)
    for name in ("w", "b", "h"):
        assert torch.equal(state.main[name], STATE[name]) and state.main[name].dtype == STATE[name].dtype
    assert state.main["n"] == STATE["n"]
    assert state.first == {"number": 0}
    assert state.own == ({"number": 1} if world > 1 else None)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_box_of_any_cut_is_what_the_tensor_has_there(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut along every dimension, wanted along every other one; parts end anywhere."""
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    boxes = [
        Box(tuple(a for a, _ in sides), tuple(b - a for a, b in sides))
        for sides in itertools.product(*(list(itertools.pairwise(c)) for c in cuts))
    ]
    tree, _ = flatten({})
    root = tmp_path_factory.mktemp("cut")
    record = write(root, [([("t", box, whole)], {"rank": tree}) for box in boxes])
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    wanted = tuple(data.draw(st.integers(1, n - at)) for n, at in zip(shape, offset, strict=True))
    box = Box(offset, wanted)
    target = torch.full(wanted, -1.0, dtype=torch.float64)
    first = data.draw(st.none() | st.integers(0, len(boxes) - 1))
    CheckpointReader(record, [FolderSource(root)]).load([Request("t", box, shape, target)], first=first)
    assert torch.equal(target, whole[box.within(Box.whole(shape))])


def test_a_rank_that_finds_all_in_its_own_shard_reads_no_other(tmp_path: Path) -> None:
    record = commit(tmp_path, STATE, 3)
    for rank in (0, 2):
        (tmp_path / record.shards[rank].key).unlink()
    target = torch.empty(10, 20)
    CheckpointReader(record, [FolderSource(tmp_path)]).load(
        [Request("checkpoint.w", Box((10, 0), (10, 20)), (30, 20), target)], first=1
    )
    assert torch.equal(target, STATE["w"][10:20])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_each_flipped_bit_is_seen(tmp_path: Path) -> None:
    record = commit(tmp_path, STATE, 2)
    for shard in record.shards:
        path = tmp_path / shard.key
        for at in range(0, shard.size, 61):
            flip(path, at)
            with pytest.raises(ShardInvalid, match="SHA-256"):
                load_state(CheckpointReader(record, [FolderSource(tmp_path)]), 0)
            flip(path, at)
    load_state(CheckpointReader(record, [FolderSource(tmp_path)]), 0)


@pytest.mark.parametrize("harm", ["shard gone", "shard cut off", "descriptor gone", "descriptor of another"])
def test_what_is_not_there_whole_is_told_apart(tmp_path: Path, harm: str) -> None:
    record = commit(tmp_path, STATE, 2)
    path, beside = tmp_path / record.shards[1].key, tmp_path / descriptor_of(record.shards[1].key)
    if harm == "shard gone":
        path.unlink()
    elif harm == "shard cut off":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "descriptor gone":
        beside.unlink()
    else:
        beside.write_bytes((tmp_path / descriptor_of(record.shards[0].key)).read_bytes())
    with pytest.raises(ShardInvalid, match=r"shard-00001-of-00002"):
        load_state(CheckpointReader(record, [FolderSource(tmp_path)]), 0)


class Other(FolderSource):
    name = "local"


def test_a_damaged_copy_is_passed_over_for_the_next_source(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    record = commit(good, STATE, 2)
    assert commit(bad, STATE, 2) == record
    flip(bad / record.shards[0].key, record.shards[0].size - 1)
    (bad / record.shards[1].key).unlink()
    last = FolderSource(good)
    last.name = "store"
    reader = CheckpointReader(record, [Other(bad), last])
    assert torch.equal(load_state(reader, 0).main["w"], STATE["w"])
    assert set(reader.bytes_read) == {"local", "store"}


def test_a_source_that_lacks_it_says_nothing_about_the_checkpoint(tmp_path: Path) -> None:
    class Empty:
        name = "local"

        def descriptor(self, shard: Shard) -> Descriptor:
            raise NotFound(shard.key)

        def read_into(self, shard: Shard, begin: int, buffer: memoryview) -> None:
            raise NotFound(shard.key)

    record = commit(tmp_path, STATE, 2)
    assert load_state(CheckpointReader(record, [Empty(), FolderSource(tmp_path)]), 0).main["n"]["lr"] == 0.1


def test_a_skeleton_that_promises_more_than_there_is_allocates_nothing(tmp_path: Path) -> None:
    tree = {"w": {"$tensor": ["checkpoint.w", "F32", [1 << 40]]}}
    record = write(tmp_path, [([], {"rank": {}, "checkpoint": tree})])
    with pytest.raises(ShardInvalid, match="larger than its"):
        load_state(CheckpointReader(record, [FolderSource(tmp_path)]), 0)


def test_a_tensor_with_a_hole_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    whole = torch.zeros(4, 4)
    tree, _ = flatten({"w": whole})
    half = [("checkpoint.w", Box((0, 0), (2, 4)), whole)]
    record = write(tmp_path, [(half, {"rank": {}, "checkpoint": tree})])
    with pytest.raises(ShardInvalid, match=r"larger than|8 of its 16"):
        load_state(CheckpointReader(record, [FolderSource(tmp_path)]), 0)
    target = torch.empty(4, 2)
    with pytest.raises(ShardInvalid, match="not of a tensor of shape"):
        CheckpointReader(record, [FolderSource(tmp_path)]).load(
            [Request("checkpoint.w", Box.whole((4, 2)), (4, 2), target)]
        )


def test_parts_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = commit(tmp_path, STATE, 3)
    seen: list[tuple[str, int]] = []

    class Counting(FolderSource):
        def read_into(self, shard: Shard, begin: int, buffer: memoryview) -> None:
            seen.append((shard.key, begin))
            super().read_into(shard, begin, buffer)

    load_state(CheckpointReader(record, [Counting(tmp_path)]), 0)
    assert len(seen) == len(set(seen))
    assert reader_module.WORKERS > 1


# ---- together


class Counted(FolderSource):
    """Which parts were read, by all ranks."""

    def __init__(self, root: Path, seen: list[tuple[str, int]]) -> None:
        super().__init__(root)
        self._seen = seen

    def read_into(self, shard: Shard, begin: int, buffer: memoryview) -> None:
        self._seen.append((shard.key, begin))
        super().read_into(shard, begin, buffer)


@pytest.mark.parametrize(("saved", "now"), [(1, 3), (3, 3), (5, 2), (2, 5)])
def test_what_all_ranks_want_is_read_once_by_one_of_them(tmp_path: Path, saved: int, now: int) -> None:
    record = commit(tmp_path, STATE, saved)
    seen: list[tuple[str, int]] = []

    def load(peers: ThreadPeers) -> Any:
        reader = CheckpointReader(record, [Counted(tmp_path, seen)])
        return load_state(reader, peers.rank, peers=peers)

    for rank, state in enumerate(run_ranks(now, load)):
        assert not isinstance(state, Exception), state
        assert torch.equal(state.main["w"], STATE["w"]) and torch.equal(state.main["h"], STATE["h"])
        assert state.own == ({"number": rank} if rank < saved else None)
    assert sorted(seen) == sorted(set(seen))


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_damage_that_one_rank_finds_stops_all_at_the_same_place(tmp_path: Path, part: int) -> None:
    record = commit(tmp_path, STATE, 3)
    shard = record.shards[1]
    flip(tmp_path / shard.key, min(part * shard.part_size + 5, shard.size - 1))

    def load(peers: ThreadPeers) -> Any:
        return load_state(CheckpointReader(record, [FolderSource(tmp_path)]), peers.rank, peers=peers)

    found = run_ranks(3, load)
    assert all(isinstance(error, ShardInvalid) for error in found), found
    assert "SHA-256" in str(found[1])


def test_a_rank_that_cannot_use_it_keeps_no_other_waiting(tmp_path: Path) -> None:
    record = commit(tmp_path, STATE, 2)

    def load(peers: ThreadPeers) -> Any:
        def layout(_: dict[str, Any]) -> Any:
            if peers.rank == 1:
                raise ShardInvalid("not for me")
            return lambda name, shape: None

        return load_state(CheckpointReader(record, [FolderSource(tmp_path)]), peers.rank, layout, peers)

    found = run_ranks(2, load)
    assert [type(e) for e in found] == [ShardInvalid, ShardInvalid]
    assert "another rank" in str(found[0])
