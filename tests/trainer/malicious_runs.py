"""Checkpoints that nobody should load: each a function that puts one commit of step 20, number 3, above a good one of step 10.

Whoever wrote them could write the whole bucket: checksums, descriptors and records fit together unless a case is about that.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.trainer.stored_runs import put_commit, shards_of, state
from trainyard.checkpoint.format.digest import Descriptor, tree_hash
from trainyard_api.checkpoints import Record, commit_key, descriptor_key, shard_key

RUN = "run-1"
STEP, SEQ = 20, 3
Case = Callable[[Path], None]
CASES: dict[str, Case] = {}
HUGE = 1 << 62


class Canary:
    """Unpickled anywhere, it leaves a file."""

    def __reduce__(self) -> Any:
        return (os.system, ('touch "$CANARY"',))


def pickled() -> bytes:
    """What torch.save makes of a canary."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {}, "evil": Canary()}, buffer)
    return buffer.getvalue()


def put(root: Path) -> Callable[[str, bytes], None]:
    """Into the directory of a run, whatever the key."""

    def write(key: str, data: bytes) -> None:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return write


def commit(root: Path, *files: bytes) -> Record:
    return put_commit(put(root), RUN, step=STEP, seq=SEQ, files=list(files))


def case(name: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        assert name not in CASES
        CASES[name] = function
        return function

    return add


# ---- the file of a rank


def parts_of(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(header, trainyard's part of it, the tensors' bytes)."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["trainyard"]), data[8 + length :]


def assemble(header: Any, own: Any, tensors: bytes) -> bytes:
    if own is not None:
        header["__metadata__"]["trainyard"] = own if isinstance(own, str) else json.dumps(own)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def _header_case(name: str, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """`change` gets header and trainyard's part; what it returns, if anything, is the header's text."""

    def make(root: Path) -> None:
        header, own, tensors = parts_of(shards_of(state(STEP), 1)[0])
        text = change(header, own)
        if isinstance(text, bytes):
            commit(root, assemble(text, None, tensors))
        else:
            commit(root, assemble(header, own, tensors))

    case(name)(make)


def _bytes_case(name: str, data: bytes) -> None:
    case(name)(lambda root: commit(root, data) and None)


_bytes_case("a pickle in a shard's place", pickled())
_bytes_case("a shard of 7 bytes", b"\x00" * 7)
_bytes_case("a header longer than the file", struct.pack("<Q", 1 << 40) + b"{}")
_bytes_case("a header of 2**64 - 1 bytes", struct.pack("<Q", (1 << 64) - 1) + b"{}")
_bytes_case("a header that is not JSON", struct.pack("<Q", 4) + b"\xff\xfe{}")
_bytes_case("a header that is a list", struct.pack("<Q", 2) + b"[]")
_bytes_case(
    "a header nested a hundred thousand deep", struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000
)
_bytes_case(
    "a number of a million digits", struct.pack("<Q", 1_000_008) + b'{"a": ' + b"9" * 1_000_001 + b"}"
)


def _tensor(header: dict[str, Any]) -> dict[str, Any]:
    span: dict[str, Any] = header["checkpoint.state_dict.net.weight"]
    return span


def _set(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, own: _tensor(header).__setitem__(key, value)


def _tree(value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, own: own["trees"].__setitem__("checkpoint", value)


def _doubled(header: dict[str, Any], own: dict[str, Any]) -> bytes:
    header["__metadata__"]["trainyard"] = json.dumps(own)
    text = json.dumps(header)
    span = json.dumps({"checkpoint.state_dict.net.weight": _tensor(header)})[1:-1]
    return f"{text[:-1]}, {span}}}".encode()


def _offsets_missing(header: dict[str, Any], own: dict[str, Any]) -> None:
    header["__metadata__"]["DCP_SHARDING_INFO"] = "{}"


def _overlapping(header: dict[str, Any], own: dict[str, Any]) -> None:
    first = next(span for name, span in header.items() if name != "__metadata__")
    last = [
        span for name, span in header.items() if name != "__metadata__" and span["dtype"] == first["dtype"]
    ][-1]
    length = last["data_offsets"][1] - last["data_offsets"][0]
    last["data_offsets"] = [0, length]


def _whole(shape: list[int]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(header: dict[str, Any], own: dict[str, Any]) -> None:
        own["whole"]["checkpoint.state_dict.net.weight"] = shape
        tree = own["trees"]["checkpoint"]["state_dict"]["net.weight"]["$tensor"]
        tree[2] = shape

    return change


def _ref(name: str, dtype: str, shape: Any) -> dict[str, Any]:
    return {"state_dict": {"net.weight": {"$tensor": [name, dtype, shape]}}}


def _many(header: dict[str, Any], own: dict[str, Any]) -> None:
    for number in range(100_000):
        name = f"n{number}"
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


_DEEP: Any = 1
for _ in range(300):
    _DEEP = [_DEEP]

WEIGHT = "checkpoint.state_dict.net.weight"
for _name, _change in {
    "a header without metadata": lambda h, o: b"{}",
    "a tensor that is there twice": _doubled,
    "no place for a tensor": _offsets_missing,
    "tensors that overlap": _overlapping,
    "a span that begins before the file": _set("data_offsets", [-96, 0]),
    "a span that ends before it begins": _set("data_offsets", [96, 0]),
    "a span of 2**62 bytes": _set("data_offsets", [0, HUGE]),
    "a span with a fraction": _set("data_offsets", [0, 96.0]),
    "a span that is true": _set("data_offsets", [False, True]),
    "a shape of 2**62": _set("shape", [HUGE, 3]),
    "a shape with nothing and 2**62": _set("shape", [HUGE, 0]),
    "a shape of text": _set("shape", "88"),
    "a shape of 100 dimensions": _set("shape", [1] * 100),
    "an unknown dtype": _set("dtype", "PICKLE"),
    "a dtype that is an attribute of torch": _set("dtype", "load"),
    "a dtype that is a list": _set("dtype", ["F32"]),
    "100 000 tensors that have no place": _many,
    "a newer format": lambda h, o: o.__setitem__("format", 99),
    "no trees": lambda h, o: o.__setitem__("trees", [1]),
    "no tree of the checkpoint": lambda h, o: o.__setitem__("trees", {"rank": {}}),
    "no tree of the rank": lambda h, o: o["trees"].pop("rank") and None,
    "a checkpoint that is a number": _tree(3),
    "a whole tensor of 2**62 rows": _whole([HUGE, 3]),
    "a whole tensor smaller than its piece": _whole([1, 3]),
    "a whole tensor larger than its pieces": _whole([16, 3]),
    "a whole tensor of 2**62 nothings": _tree(_ref(WEIGHT, "F32", [HUGE, 0])),
    "a tensor that is not there": _tree(_ref("nowhere", "F32", [8, 3])),
    "a tensor of another dtype": _tree(_ref(WEIGHT, "F64", [8, 3])),
    "a tensor of another shape": _tree(_ref(WEIGHT, "F32", [3, 8])),
    "a tensor whose name is a number": _tree({"w": {"$tensor": [5, "F32", [8, 3]]}}),
    "a tensor with a negative length": _tree(_ref(WEIGHT, "F32", [-8, -3])),
    "an unknown kind in the skeleton": _tree({"a": {"$pickle": "gASV"}}),
    "a kind beside other keys": _tree({"a": {"$tuple": [], "b": 1}}),
    "a float that is an expression": _tree({"a": {"$float": "__import__('os')"}}),
    "a dtype that is a function": _tree({"a": {"$dtype": "load"}}),
    "a device that is none": _tree({"a": {"$device": "evil:0"}}),
    "bytes that are not base64": _tree({"a": {"$bytes": "\u0000"}}),
    "a size of text": _tree({"a": {"$size": ["x"]}}),
    "a dict with keys that cannot be keys": _tree({"$dict": [[["list"], 1]]}),
    "a set of dicts": _tree({"a": {"$set": [{}]}}),
    "a sparse tensor of 2**62": _tree(
        {"a": {"$sparse": [{"$tensor": [WEIGHT, "F32", [8, 3]]}, 1, [HUGE, HUGE]]}}
    ),
    "a skeleton 300 deep": _tree({"a": _DEEP}),
}.items():
    _header_case(_name, _change)  # type: ignore[arg-type]


@case("pieces that overlap and leave a gap of the same size")
def _gap(root: Path) -> None:
    """All elements are there by their number, and two rows are not: memory that was never written."""
    files = shards_of(state(STEP), 2)
    header, own, tensors = parts_of(files[1])
    offsets = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    for name in (WEIGHT, "checkpoint.optimizer_states.0.state.0.exp_avg"):
        if name in offsets:
            offsets[name]["saved_offsets"] = [2, 0]
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(offsets)
    commit(root, files[0], assemble(header, own, tensors))


@case("parts swapped between shards")
def _swapped(root: Path) -> None:
    record = commit(root, *shards_of(state(STEP), 2))
    one, two = (root / s.key for s in record.shards)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def _damage(name: str, change: Callable[[bytearray], Any], *, of: str) -> None:
    def make(root: Path) -> None:
        record = commit(root, *shards_of(state(STEP), 2))
        shard = root / record.shards[0].key
        path = {"shard": shard, "descriptor": shard.with_suffix(".json"), "record": root / commit_key(SEQ)}[
            of
        ]
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    case(name)(make)


def _flip(at: float) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[int(at * (len(data) - 1))] ^= 4

    return change


_damage("a bit flipped in the header's length", _flip(0), of="shard")
_damage("a bit flipped in the header", _flip(0.2), of="shard")
_damage("a bit flipped in a tensor", _flip(1), of="shard")
_damage("a shard that is cut off", lambda d: d.__delitem__(slice(len(d) // 2, None)), of="shard")
_damage("an empty shard", lambda d: d.clear(), of="shard")
_damage("a descriptor that is cut off", lambda d: d.__delitem__(slice(len(d) // 2, None)), of="descriptor")
_damage("an empty descriptor", lambda d: d.clear(), of="descriptor")
_damage("a record that is cut off", lambda d: d.__delitem__(slice(len(d) // 2, None)), of="record")
_damage("a record that is empty", lambda d: d.clear(), of="record")
_damage("a record that is a pickle", lambda d: d.__setitem__(slice(None), pickled()), of="record")
_damage("a record nested deep", lambda d: d.__setitem__(slice(None), b"[" * 100_000), of="record")


# ---- descriptors and records that lie


def _descriptor_case(name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    def make(root: Path) -> None:
        record = commit(root, *shards_of(state(STEP), 1))
        path = root / descriptor_key(record.step, record.attempt, 0, 1)
        data = json.loads(path.read_text())
        changed = change(data)
        path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(data).encode())

    case(name)(make)


_descriptor_case("a descriptor with other parts", lambda d: d.__setitem__("parts", ["0" * 64]))
_descriptor_case("a descriptor with no parts", lambda d: d.__setitem__("parts", []))
_descriptor_case("a descriptor with parts that are no hex", lambda d: d.__setitem__("parts", ["x" * 64]))
_descriptor_case("a descriptor with parts of one byte", lambda d: d["shard"].__setitem__("partSize", 1))
_descriptor_case("a descriptor with parts of none", lambda d: d["shard"].__setitem__("partSize", 0))
_descriptor_case("a descriptor of 2**62 bytes", lambda d: d["shard"].__setitem__("size", HUGE))
_descriptor_case("a descriptor of negative size", lambda d: d["shard"].__setitem__("size", -1))
_descriptor_case(
    "a descriptor of another shard", lambda d: d["shard"].__setitem__("key", shard_key(20, 1, 0, 2))
)
_descriptor_case("a descriptor that is a list", lambda d: b"[1]")
_descriptor_case("a descriptor nested deep", lambda d: b"[" * 100_000)


@case("a shard of 2**62 bytes, in parts that add up")
def _endless_parts(root: Path) -> None:
    record = commit(root, *shards_of(state(STEP), 1))
    size = part = 1 << 62
    while part * 9000 > size:
        part //= 2
    parts = ["0" * 64] * -(-size // (part * 2))
    shard = replace(record.shards[0], size=size, part_size=part * 2, sha256=tree_hash(parts))
    path = root / descriptor_key(record.step, record.attempt, 0, 1)
    path.write_text(json.dumps(Descriptor(shard=shard, parts=parts).to_json()))
    (root / commit_key(SEQ)).write_text(json.dumps(replace(record, shards=[shard]).to_json()))


def _record_case(name: str, change: Callable[[dict[str, Any]], Any], world: int = 1) -> None:
    def make(root: Path) -> None:
        commit(root, *shards_of(state(STEP), world))
        path = root / commit_key(SEQ)
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    case(name)(make)


def _in_shard(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda d: d["shards"][0].__setitem__(key, value)


for _name, _change in {
    "a record of another run": lambda d: d.__setitem__("run", "run-2"),
    "a record with another number": lambda d: d.__setitem__("seq", 7),
    "a record that is newer": lambda d: d.__setitem__("version", 99),
    "a record of an unknown kind": lambda d: d.__setitem__("kind", "exec"),
    "a record with a negative step": lambda d: d.__setitem__("step", -20),
    "a record whose step is text": lambda d: d.__setitem__("step", "20"),
    "a record whose step is true": lambda d: d.__setitem__("step", True),
    "a record of 2**62 ranks": lambda d: d.__setitem__("worldSize", HUGE),
    "a record whose shards are an object": lambda d: d.__setitem__("shards", {"0": 1}),
    "a record without shards": lambda d: d.__setitem__("shards", []),
    "a record of no rank": lambda d: d.update(shards=[], worldSize=0),
    "a key outside of the run": _in_shard(
        "key", "data/step-000000000020/a000001/../../../../secret.safetensors"
    ),
    "an absolute key": _in_shard("key", "/etc/passwd"),
    "a key of another step": _in_shard("key", shard_key(10, 1, 0, 1)),
    "a key with a newline": _in_shard("key", shard_key(20, 1, 0, 1) + "\n"),
    "a shard of 2**62 bytes": _in_shard("size", HUGE),
    "a shard of negative size": _in_shard("size", -1),
    "a shard with a size of text": _in_shard("size", "1"),
    "a shard with another checksum": _in_shard("sha256", "0" * 64),
    "a shard with a checksum that is none": _in_shard("sha256", "../../x"),
    "a shard in parts of none": _in_shard("partSize", 0),
    "a shard in parts of one byte": _in_shard("partSize", 1),
}.items():
    _record_case(_name, _change)
_record_case(
    "one shard for two ranks", lambda d: d["shards"][1].__setitem__("key", d["shards"][0]["key"]), world=2
)
_record_case("the shards in another order", lambda d: d["shards"].reverse() or d["shards"][0].update(rank=0)
             or d["shards"][1].update(rank=1), world=2)  # fmt: skip


@case("numbers that are none in a record")
def _nan(root: Path) -> None:
    commit(root, *shards_of(state(STEP), 1))
    path = root / commit_key(SEQ)
    data = json.loads(path.read_text())
    data["shards"][0]["size"] = float("nan")
    path.write_text(json.dumps(data))


# ---- links out of the directory


@case("a shard that is a link out of the directory")
def _link(root: Path) -> None:
    record = commit(root, *shards_of(state(STEP), 1))
    shard, secret = root / record.shards[0].key, root.parent / "secret.safetensors"
    shard.replace(secret)
    shard.symlink_to(secret)


@case("a folder that is a link out of the directory")
def _folder_link(root: Path) -> None:
    record = commit(root, *shards_of(state(STEP), 1))
    folder, outside = (root / record.shards[0].key).parent, root.parent / "outside"
    folder.replace(outside)
    folder.symlink_to(outside)


@case("a record that is a link to a device")
def _device(root: Path) -> None:
    commit(root, *shards_of(state(STEP), 1))
    path = root / commit_key(SEQ)
    path.unlink()
    path.symlink_to("/dev/zero")


@case("a descriptor that is a link to a device")
def _endless(root: Path) -> None:
    record = commit(root, *shards_of(state(STEP), 1))
    path = (root / record.shards[0].key).with_suffix(".json")
    path.unlink()
    path.symlink_to("/dev/zero")


@case("a descriptor of a gigabyte")
def _large(root: Path) -> None:
    record = commit(root, *shards_of(state(STEP), 1))
    with (root / record.shards[0].key).with_suffix(".json").open("r+b") as file:
        file.truncate(1 << 30)
