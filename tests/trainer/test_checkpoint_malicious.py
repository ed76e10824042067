"""What came from a bucket that somebody else can write: refused with a sentence, nothing runs, memory stays bounded, and the
run goes on from the checkpoint before."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.forkhost import Host
from tests.trainer.malicious_runs import CASES, RUN, Canary, pickled, put
from tests.trainer.stored_runs import put_commit, put_fence, state

VICTIM = str(Path(__file__).with_name("malicious_victim.py"))
MOST_GROWN = 700 << 20
"""Bytes of memory that one case may cost: what is there twice for a header of 100 MiB, which safetensors allows."""


# ---- .ckpt files


def archive(
    data: bytes, more: dict[str, bytes] | None = None, *, compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A file as torch.save makes it, around a pickle of our own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", "little")
        for name, content in (more or {}).items():
            file.writestr(f"archive/{name}", content)
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def bomb() -> bytes:
    """A small file of a tensor of 1.5 GiB: zeros, compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_pickle(3 << 27))
        file.writestr("archive/byteorder", "little")
        with file.open("archive/data/0", "w", force_zip64=True) as out:
            for _ in range(96):
                out.write(bytes(16 << 20))
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def tensor_pickle(numel: int, size: int | None = None, stride: int = 1) -> bytes:
    """{"state_dict": tensor} of a float storage of `numel`."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(obj, Storage) else None

    class Tensor:
        def __reduce__(self) -> Any:
            shape = (numel if size is None else size,)
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, shape, (stride,), False, {})

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"state_dict": Tensor()})
    return buffer.getvalue()


def calls(name: str, argument: bytes) -> bytes:
    """A pickle that calls the global `name` (module newline attribute) with what `argument` pushes."""
    return b"\x80\x02c" + name.encode() + b"\n" + argument + b"\x85R."


def laughs() -> bytes:
    """Each list holds the one before ten times: 10**12 numbers, if anybody copies them."""
    data = b"\x80\x02]q\x00K\x01a"
    for number in range(12):
        data += b"](" + b"h" + bytes([number]) + (b"h" + bytes([number])) * 9 + b"eq" + bytes([number + 1])
    return data + b"."


FILES: dict[str, Callable[[], bytes]] = {
    "a pickle that runs a program": pickled,
    "a pickle without an archive": lambda: pickle.dumps(Canary()),
    "eval": lambda: archive(calls("builtins\neval", b"X\x0b\x00\x00\x00open('x','w')"[:16])),
    "a chain of getattr": lambda: archive(calls("builtins\ngetattr", b"K\x01")),
    "torch.load itself": lambda: archive(calls("torch\nload", b"X\x01\x00\x00\x00x")),
    "a terabyte of zeros by one call": lambda: archive(
        calls("builtins\nbytearray", b"\x8a\x06\x00\x00\x00\x00\x00\x01")
    ),
    "text of 2**62 bytes": lambda: archive(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x."),
    "a memo with the number 2**31": lambda: archive(b"\x80\x02K\x01r\xff\xff\xff\x7f."),
    "nested a million deep": lambda: archive(b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b"."),
    "lists of lists of lists": lambda: archive(laughs()),
    "a stack that is empty": lambda: archive(b"\x80\x02RRRR."),
    "a tensor larger than its storage": lambda: archive(tensor_pickle(4, 1 << 40), {"data/0": bytes(16)}),
    "a storage larger than its record": lambda: archive(tensor_pickle(1 << 40), {"data/0": bytes(16)}),
    "a storage of negative size": lambda: archive(tensor_pickle(-4, 4), {"data/0": bytes(16)}),
    "a negative stride": lambda: archive(tensor_pickle(4, 4, -1), {"data/0": bytes(16)}),
    "a zip bomb": bomb,
    "a list": lambda: archive(pickle.dumps([1, 2], 2)),
    "no pickle": lambda: archive(b"\x00\x01"),
    "nothing": lambda: b"",
    "a zip without anything": lambda: b"PK\x05\x06" + bytes(18),
    "half of a file": lambda: pickled()[:300],
}


# ---- what became of them


def put_good(root: Path) -> None:
    put_fence(put(root), RUN, seq=1, attempt=1)
    put_commit(put(root), RUN, step=10, seq=2, world=2)


def good_file() -> bytes:
    return archive(tensor_pickle(4), {"data/0": bytes(16)})


@pytest.fixture(scope="module")
def results(host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases, one after the other in one process, which has to live through all of them."""
    base = tmp_path_factory.mktemp("malicious")
    cases: list[tuple[str, str, str]] = []
    for number, name in enumerate([*CASES, "good", "bad alone"]):
        folder = base / f"run{number}"
        if name != "bad alone":
            put_good(folder / RUN)
        if name == "good":
            put_commit(put(folder / RUN), RUN, step=20, seq=3, world=2)
        else:
            CASES.get(name, CASES["a pickle in a shard's place"])(folder / RUN)
        cases.append((name, "run", str(folder)))
    for number, (name, make) in enumerate({**FILES, "a good file": good_file}.items()):
        path = base / f"evil{number}.ckpt"
        path.write_bytes(make())
        cases.append((name, "file", str(path)))
    given, taken = base / "cases", base / "results"
    given.write_text("".join(json.dumps(case) + "\n" for case in cases))
    (rank,) = host.run([VICTIM, str(given), str(taken)], seconds=240)
    found = [json.loads(line) for line in taken.read_text().splitlines()]
    assert rank.code == 0, f"died after {found[-1:]}: {rank.output[-3000:]}"
    return {each["name"]: each for each in found}


def harmless(found: dict[str, Any]) -> None:
    assert not found["canary"], "something of it ran"
    assert found["grown"] < MOST_GROWN


@pytest.mark.parametrize("name", CASES)
def test_a_bad_commit_is_passed_over(results: dict[str, dict[str, Any]], name: str) -> None:
    found = results[name]
    harmless(found)
    assert found.get("step") == 10, found
    assert found["sum"] == float(state(10)["state_dict"]["net.weight"].sum())
    assert 0 < len(found["fell_back"]) < 1000, "it must say why"
    assert "Traceback" not in found["fell_back"]


def test_the_corpus_is_not_refused_for_being_made_by_hand(results: dict[str, dict[str, Any]]) -> None:
    found = results["good"]
    assert (found["step"], found["fell_back"]) == (20, "")
    assert results["a good file"]["keys"] == ["state_dict"]


def test_a_run_with_nothing_good_is_refused_and_never_begins_anew(results: dict[str, dict[str, Any]]) -> None:
    found = results["bad alone"]
    assert found["error"] == "NoUsableCheckpoint", found
    assert "will not begin from zero" in found["said"]


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused(results: dict[str, dict[str, Any]], name: str) -> None:
    found = results[name]
    harmless(found)
    assert "CheckpointError" in found.get("family", []), found
    assert ".ckpt" in found["said"]
    assert "\n" not in found["said"]
