"""Headers, descriptors and boxes; and that others' readers read what we write."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.unit.ckpt_meshes import as_rank, sharded
from trainyard.checkpoint.errors import ShardInvalid
from trainyard.checkpoint.format import digest
from trainyard.checkpoint.format.digest import Descriptor, part_size, spans, tree_hash
from trainyard.checkpoint.format.dtypes import NAMES
from trainyard.checkpoint.format.geometry import Box
from trainyard.checkpoint.format.shardfile import (
    Wanted,
    header_length,
    make_header,
    read_header,
)
from trainyard.checkpoint.plan import assign
from trainyard.checkpoint.staging import StagingFolder, stage
from trainyard_api.checkpoints import Shard as ShardEntry
from trainyard_api.checkpoints import shard_key

# ---- boxes

boxes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=3).map(
    lambda sides: Box(tuple(o for o, _ in sides), tuple(n for _, n in sides))
)


def cells(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))))


@settings(max_examples=300)
@given(st.data(), boxes)
def test_overlap_is_what_both_have(data: st.DataObject, a: Box) -> None:
    side = st.tuples(st.integers(0, 4), st.integers(0, 4))
    sides = data.draw(st.lists(side, min_size=len(a.shape), max_size=len(a.shape)))
    b = Box(tuple(o for o, _ in sides), tuple(n for _, n in sides))
    both = a.overlap(b)
    assert (cells(both) if both else set()) == cells(a) & cells(b)
    assert b.overlap(a) == both
    assert a.numel == len(cells(a))
    if both is not None:
        number = torch.arange(8 ** len(a.shape)).reshape((8,) * len(a.shape))
        of_a = number[a.within(Box.whole(tuple(number.shape)))]
        assert torch.equal(of_a[both.within(a)], number[both.within(Box.whole(tuple(number.shape)))])


# ---- headers

names = st.text(min_size=1, max_size=8).filter(
    lambda t: t != "__metadata__" and not any("\ud800" <= c <= "\udfff" for c in t)
)


@st.composite
def wanted(draw: st.DrawFn, name: str) -> Wanted:
    sides = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 3)), max_size=3))
    offset, shape, rest = (tuple(s[i] for s in sides) for i in range(3))
    dtype = getattr(torch, draw(st.sampled_from([ours for _, ours in NAMES])))
    whole = tuple(o + n + r for o, n, r in zip(offset, shape, rest, strict=True))
    return Wanted(name=name, dtype=dtype, box=Box(offset, shape), whole=whole)


pieces = st.lists(names, max_size=6, unique=True).flatmap(lambda given: st.tuples(*map(wanted, given)))
trees = st.dictionaries(
    st.sampled_from(["rank", "checkpoint"]), st.recursive(st.integers(), st.lists, max_leaves=4)
)


@settings(deadline=None)
@given(pieces, trees)
def test_a_header_comes_back(given_: tuple[Wanted, ...], trees: dict[str, Any]) -> None:
    made = make_header(given_, trees)
    read = read_header(made.raw, made.size)
    assert read == made
    assert header_length(made.raw[:8], made.size) == len(made.raw)
    assert {e.name: (e.torch_dtype, e.box, e.whole) for e in read.entries.values()} == {
        w.name: (w.dtype, w.box, w.whole) for w in given_
    }
    at = len(made.raw)
    for entry in read.entries.values():
        assert entry.begin == at
        assert entry.begin % entry.torch_dtype.itemsize == 0, "aligned"
        at = entry.end
    assert at == made.size
    assert make_header(reversed(given_), trees).raw == made.raw, "whatever the order"


def header_of(text: dict[str, Any]) -> bytes:
    data = json.dumps(text).encode()
    return struct.pack("<Q", len(data)) + data


def good() -> tuple[dict[str, Any], int]:
    """A header as JSON, and how many bytes of tensors follow it."""
    made = make_header(
        [
            Wanted(name=name, dtype=torch.float32, box=Box((1, 0), (2, 3)), whole=(4, 3))
            for name in ("a", "b")
        ],
        {"rank": {}},
    )
    return json.loads(made.raw[8:]), made.size - len(made.raw)


def inside(text: dict[str, Any], key: str, **changes: Any) -> None:
    own = json.loads(text["__metadata__"][key])
    text["__metadata__"][key] = json.dumps({**own, **changes})


def change(path: str, value: Any) -> Any:
    *keys, last = path.split(".")

    def damage(text: dict[str, Any]) -> None:
        for key in keys:
            text = text[key]
        text[last] = value

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        change("a.data_offsets", [0, 20]),
        change("a.data_offsets", [0, 28]),
        change("b.data_offsets", [0, 24]),
        change("b.data_offsets", [12, 36]),
        change("b.data_offsets", [28, 52]),
        change("a.data_offsets", [-24, 0]),
        change("a.data_offsets", [0.0, 24.0]),
        change("a.data_offsets", [False, 24]),
        change("a.data_offsets", [0]),
        change("a.data_offsets", "ab"),
        change("a.shape", [3, 2**62, 2**62]),
        change("a.shape", [2, 4]),
        change("a.shape", [6]),
        change("a.shape", [-2, -3]),
        change("a.shape", [1] * 40 + [6]),
        change("a.shape", None),
        change("a.dtype", "F64"),
        change("a.dtype", "PICKLE"),
        change("a.dtype", ["F32"]),
        change("a", []),
        change("c", {"dtype": "F32", "shape": [0], "data_offsets": [48, 48]}),
        change("__metadata__", {}),
        change("__metadata__", []),
        change("__metadata__.trainyard", "[" * 100_000),
        change("__metadata__.trainyard", "[]"),
        change("__metadata__.trainyard", '{"format": 3, "format": 3}'),
        change("__metadata__.DCP_SHARDING_INFO", "{}"),
        change("__metadata__.DCP_SHARDING_INFO", "no"),
        lambda t: inside(t, "trainyard", format=99),
        lambda t: inside(t, "trainyard", trees=[]),
        lambda t: inside(t, "trainyard", whole={"a": [4, 3]}),
        lambda t: inside(t, "trainyard", whole={"a": [2, 3], "b": [4, 3]}),
        lambda t: inside(t, "trainyard", whole={"a": [4], "b": [4, 3]}),
        lambda t: inside(t, "DCP_SHARDING_INFO", a={"saved_offsets": [3, 0]}),
        lambda t: inside(t, "DCP_SHARDING_INFO", a={"saved_offsets": [-1, 0]}),
        lambda t: inside(t, "DCP_SHARDING_INFO", a={"saved_offsets": [1]}),
        lambda t: inside(t, "DCP_SHARDING_INFO", a=[]),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(damage: Any) -> None:
    text, length = good()
    data = header_of(text)
    assert set(read_header(data, len(data) + length).entries) == {"a", "b"}, "it was sound"
    damage(text)
    data = header_of(text)
    with pytest.raises(ShardInvalid):
        read_header(data, len(data) + length)


def test_a_file_of_another_size_is_refused() -> None:
    text, length = good()
    data = header_of(text)
    for size in (len(data) + length - 1, len(data) + length + 1, len(data), len(data) - 1, 8, 0):
        with pytest.raises(ShardInvalid):
            read_header(data, size)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_makes_it_raise_anything_else(data: st.DataObject) -> None:
    text, length = good()
    raw = bytearray(header_of(text))
    size = len(raw) + length
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    try:
        found = read_header(bytes(cut), size)
    except ShardInvalid:
        return
    assert all(0 <= e.begin <= e.end <= size for e in found.entries.values())


# ---- descriptors


def described(size: int = 100, part: int | None = None, parts: list[str] | None = None) -> dict[str, Any]:
    part = part_size(size) if part is None else part
    parts = (
        [digest.digest(str(span).encode()) for span in spans(size, part_size(size))]
        if parts is None
        else parts
    )
    shard = ShardEntry(key=shard_key(1, 1, 0, 1), rank=0, size=size, sha256=tree_hash(parts), part_size=part)
    return Descriptor(shard=shard, parts=parts).to_json()


@given(st.integers(1, 10**15))
def test_parts_cover_the_file_and_are_as_many_as_s3_takes(size: int) -> None:
    part = part_size(size)
    assert part >= 5 << 20
    assert -(-size // part) <= 10_000
    if size < 10**12:
        found = spans(size, part)
        assert found[0][0] == 0
        assert found[-1][1] == size
        assert all(a[1] == b[0] and a[1] - a[0] == part for a, b in itertools.pairwise(found))


def test_the_digest_is_the_one_that_s3_makes_of_parts() -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html, "composite"."""
    parts = [b"one", b"two"]
    wanted = hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()
    assert tree_hash([digest.digest(p) for p in parts]) == wanted


def test_a_descriptor_comes_back() -> None:
    text = json.loads(json.dumps(described(40 << 20)))
    found = Descriptor.from_json(text)
    assert len(found.parts) == 3
    assert Descriptor.from_json(text, found.shard) == found
    for other in ({"sha256": "0" * 64}, {"size": 5}, {"key": shard_key(2, 1, 0, 1)}, {"rank": 1}):
        with pytest.raises(ShardInvalid, match="committed"):
            Descriptor.from_json(text, dataclasses.replace(found.shard, **other))


@pytest.mark.parametrize(
    "text",
    [
        described(parts=[]), described(parts=["0" * 64] * 2), described(part=0), described(part=-1), described(part=1),
        described(part=1 << 40), {**described(), "parts": ["0" * 64]}, {**described(), "parts": ["zz"]},
        {**described(), "parts": [1]}, {**described(), "parts": "ab"}, {"parts": []}, {}, [], None, 3, "x",
        {**described(), "shard": None}, {**described(), "shard": {**described()["shard"], "size": 0}},
        {**described(), "shard": {**described()["shard"], "size": -1}},
        {**described(), "shard": {**described()["shard"], "size": 10**30}},
        {**described(), "shard": {**described()["shard"], "size": "100"}},
    ],
)  # fmt: skip
def test_a_descriptor_that_lies_is_refused(text: Any) -> None:
    with pytest.raises(ShardInvalid):
        Descriptor.from_json(text)


# ---- other readers


def written(root: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of four ranks in `root`; the whole tensors."""
    wholes = {
        "checkpoint.fsdp": torch.randn(10, 3), "checkpoint.hsdp": torch.randn(7, 5), "checkpoint.columns": torch.randn(3, 9),
        "checkpoint.tiny": torch.randn(2), "checkpoint.plain": torch.randn(300, 100), "checkpoint.step": torch.tensor(3),
        "checkpoint.half": torch.randn(5).bfloat16(),
    }  # fmt: skip
    for rank in range(4):
        with as_rank(rank, 4):
            line = DeviceMesh("cpu", torch.arange(4))
            grid = DeviceMesh("cpu", torch.arange(4).reshape(2, 2))
            tensors = dict(wholes)
            for name in ("fsdp", "tiny"):
                tensors[f"checkpoint.{name}"] = sharded(wholes[f"checkpoint.{name}"], line, [Shard(0)])
            tensors["checkpoint.columns"] = sharded(wholes["checkpoint.columns"], line, [Shard(1)])
            tensors["checkpoint.hsdp"] = sharded(wholes["checkpoint.hsdp"], grid, [Replicate(), Shard(0)])
            plan = assign(tensors, rank=rank, world=4, replicated={"checkpoint.plain"})
            folder = StagingFolder({"TRAINYARD_RUNTIME_DIR": str(root.parent / "rt")})
            trees: dict[str, Any] = {"rank": {}, **({"checkpoint": {}} if rank == 0 else {})}
            file = stage(plan, trees, folder, step=1, attempt=1, rank=rank, world=4)
            root.mkdir(exist_ok=True)
            file.path.rename(root / file.path.name)
    return wholes


def test_safetensors_reads_it(tmp_path: Path) -> None:
    wholes = written(tmp_path / "ckpt")
    pieces: dict[str, int] = {}
    for path in sorted((tmp_path / "ckpt").iterdir()):
        header = read_header(path.read_bytes(), path.stat().st_size)
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(header.entries)
            for name, entry in header.entries.items():
                found = file.get_tensor(name)
                assert torch.equal(found, wholes[name][entry.box.within(Box.whole(entry.whole))])
                pieces[name] = pieces.get(name, 0) + found.numel()
    assert pieces == {name: whole.numel() for name, whole in wholes.items()}


def test_torchs_own_reader_reads_it(tmp_path: Path) -> None:
    wholes = written(tmp_path / "ckpt")
    state = {name: torch.zeros_like(whole) for name, whole in wholes.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "ckpt")), no_dist=True)
    assert {name: torch.equal(state[name], wholes[name]) for name in wholes} == dict.fromkeys(wholes, True)


@pytest.mark.parametrize("rank", range(3))
def test_torchs_own_reader_reshards_it(tmp_path: Path, rank: int) -> None:
    """From four ranks to the `rank`-th of three, other placements."""
    wholes = written(tmp_path / "ckpt")
    with as_rank(rank, 3):
        mesh = DeviceMesh("cpu", torch.arange(3))
        state: dict[str, Any] = {}
        for name, whole in wholes.items():
            placement = Shard(0) if name.endswith(("hsdp", "plain", "columns", "fsdp")) else Replicate()
            state[name] = sharded(torch.zeros_like(whole), mesh, [placement])
        load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "ckpt")), no_dist=True)
        for name, whole in wholes.items():
            value = state[name]
            assert isinstance(value, DTensor)
            wanted = sharded(whole, mesh, value.placements)
            assert torch.equal(value.to_local(), wanted.to_local()), name
