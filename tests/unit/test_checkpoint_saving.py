"""A save's plan is used again, and only as long as it is still true."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainyard.checkpoint.errors import CheckpointConfigError
from trainyard.checkpoint.format.shardfile import Layout, header_length, read_header
from trainyard.checkpoint.payload import Payload
from trainyard.checkpoint.plan import assign
from trainyard.checkpoint.saving import Planner, save_shard
from trainyard.checkpoint.staging import StagingFolder, layout_of

Tensors = dict[str, torch.Tensor]
REPLICATED = frozenset({"checkpoint.w", "checkpoint.v"})


def tensors(value: float = 0.0) -> Tensors:
    return {
        "checkpoint.w": torch.full((300, 200), value), "checkpoint.v": torch.full((5,), value),
        "checkpoint.step": torch.tensor(value), "checkpoint.none": torch.empty(0, 3), "rank-00001.rng": torch.full((7,), value),
    }  # fmt: skip


def without(name: str) -> Tensors:
    return {n: t for n, t in tensors().items() if n != name}


CHANGES: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "a shape": (tensors() | {"checkpoint.w": torch.zeros(301, 200)}, {}),
    "a shape with as many elements": (tensors() | {"checkpoint.w": torch.zeros(200, 300)}, {}),
    "a dtype": (tensors() | {"checkpoint.v": torch.zeros(5, dtype=torch.int32)}, {}),
    "one more": (tensors() | {"checkpoint.callbacks.ema": torch.zeros(4)}, {}),
    "one less": (without("checkpoint.v"), {}),
    "another name": (without("checkpoint.v") | {"checkpoint.u": torch.zeros(5)}, {}),
    "not empty any more": (tensors() | {"checkpoint.none": torch.zeros(2, 3)}, {}),
    "the world": (tensors(), {"world": 3}),
    "the rank": (tensors(), {"rank": 0}),
    "what is replicated": (tensors(), {"replicated": frozenset({"checkpoint.w"})}),
}


def same(found: Any, wanted: Any) -> None:
    (pieces, layout), (expected, fresh) = found, wanted
    assert [(p.name, p.box, p.whole, p.rows) for p in pieces] == [
        (p.name, p.box, p.whole, p.rows) for p in expected
    ]
    assert all(
        torch.equal(a.local, b.local) and a.local.dtype == b.local.dtype
        for a, b in zip(pieces, expected, strict=True)
    )
    assert layout.beginning({"rank": 1}) == fresh.beginning({"rank": 1})


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_makes_a_new_plan(change: str) -> None:
    planner, place = Planner(), {"rank": 1, "world": 2, "replicated": REPLICATED}
    planner.plan(tensors(), **place)
    changed, other = CHANGES[change]
    found = planner.plan(changed, **place | other)
    assert planner.made == 2
    expected = assign(changed, **place | other)
    same(found, (expected, layout_of(expected)))


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_without_a_change_the_plan_is_used_with_the_tensors_of_now(rank: int, world: int) -> None:
    planner, place = Planner(), {"rank": rank, "world": world, "replicated": REPLICATED}
    for value in (1.0, 2.0, 3.0):
        now = {n.replace("00001", f"{rank:05d}"): t for n, t in tensors(value).items()}
        expected = assign(now, **place)
        same(planner.plan(now, **place), (expected, layout_of(expected)))
    assert planner.made == 1


def test_a_plan_keeps_no_tensor_alive() -> None:
    import weakref

    planner, held = Planner(), tensors()
    planner.plan(held, rank=0, world=1, replicated=REPLICATED)
    gone = weakref.ref(held["checkpoint.w"])
    del held
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "name", ["plain", 'quotes "and" \\ backslashes', "unicode \u00fc\U0001f600 \x01", "a.b.c"]
)
def test_the_header_is_json_in_json_whatever_the_names(name: str) -> None:
    pieces = assign({f"checkpoint.{name}": torch.zeros(2, 2)}, rank=0, world=1)
    trees = {"rank": {name: [1, 2.5, None]}, "checkpoint": {'"': "\\u0041"}}
    layout = layout_of(pieces)
    raw = layout.beginning(trees)
    text = json.loads(raw[8 : header_length(raw, len(raw) + 16)])
    assert json.loads(text["__metadata__"]["trainyard"])["trees"] == trees
    header = read_header(raw, len(raw) + layout.bytes)
    assert list(header.entries) == [f"checkpoint.{name}"]
    assert header.trees == trees


def test_a_header_without_any_tensor() -> None:
    raw = Layout([]).beginning({"rank": {}})
    assert read_header(raw, len(raw)).entries == {}


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(tmp_path: Path, enabled: bool) -> None:
    folder = StagingFolder(target=tmp_path)
    seen: list[bool] = []

    class Watching(dict[str, Any]):
        pass

    def save(state: dict[str, Any]) -> Any:
        return save_shard(Payload(checkpoint=state, own={}), folder, step=1, attempt=1, rank=0, world=1)

    (gc.enable if enabled else gc.disable)()
    try:
        save({"w": torch.ones(3)})
        seen.append(gc.isenabled())
        with pytest.raises(CheckpointConfigError):
            save({"bad": Watching()})
        seen.append(gc.isenabled())
    finally:
        gc.enable()
        folder.close()
    assert seen == [enabled, enabled]


def test_what_is_saved_by_a_plan_used_again_is_what_is_loaded(tmp_path: Path) -> None:
    folder, planner = StagingFolder(target=tmp_path), Planner()
    find: Callable[[int], Any] = lambda step: save_shard(  # noqa: E731
        Payload(checkpoint={"w": torch.full((9,), float(step)), "n": step}, own={}), folder, planner,
        step=step, attempt=1, rank=0, world=1,
    )  # fmt: skip
    try:
        for step in (1, 2):
            data = find(step).path.read_bytes()
            header = read_header(data, len(data))
            entry = header.entries["checkpoint.w"]
            found = torch.frombuffer(bytearray(data[entry.begin : entry.end]), dtype=torch.float32)
            assert torch.equal(found, torch.full((9,), float(step)))
            assert header.trees["checkpoint"]["n"] == step
        assert planner.made == 1
    finally:
        folder.close()
