"""Generators: all kinds are in a checkpoint, and what is read from aside does not move them."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.loaders import Counting, OwnGenerators
from trainyard.checkpoint.format.tree import flatten, unflatten
from trainyard.data.memory import Memory, pack, unpack
from trainyard.reproducibility import OwnDraws, isolate_rng, reseed, reseed_cpu, rng_state, set_rng_state


def draw() -> tuple[Any, ...]:
    """From everything; an odd number of normal ones, so that half-used pairs count."""
    return (
        random.random(), random.gauss(0, 1), np.random.rand(), float(np.random.randn()), torch.rand(1).item(),
        torch.randn(3).tolist(),
    )  # fmt: skip


def through_a_file(state: Any) -> Any:
    skeleton, tensors = flatten(state)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return unflatten(json.loads(json.dumps(skeleton)), lambda ref: copies[ref.name])


def test_state_of_all_generators_survives_a_checkpoint() -> None:
    draw()
    state = through_a_file(rng_state())
    expected = draw()
    reseed(4)
    set_rng_state(state)
    assert draw() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_state_of_all_devices_survives_a_checkpoint() -> None:
    def on_devices() -> list[float]:
        return [torch.rand(1, device=f"cuda:{n}").item() for n in range(torch.cuda.device_count())]

    on_devices()
    state = through_a_file(rng_state())
    expected = on_devices()
    reseed(4)
    set_rng_state(state)
    assert on_devices() == expected


def test_states_of_devices_that_are_not_here_are_left_out() -> None:
    state = rng_state()
    if not torch.cuda.is_available():
        state["cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    set_rng_state(state)


def test_isolated_draws_leave_no_trace() -> None:
    state = rng_state()
    expected = draw()
    set_rng_state(state)
    with isolate_rng():
        draw()
        reseed(1)
    assert draw() == expected


def test_own_draws_go_on_where_they_were_and_leave_no_trace() -> None:
    def numbers() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    reseed_cpu(1)
    mine = [numbers() for _ in range(4)]
    reseed_cpu(2)
    theirs = [numbers() for _ in range(4)]
    draws = OwnDraws(2)
    reseed_cpu(1)
    seen: list[Any] = []
    for n in range(4):
        assert numbers() == mine[n]
        with draws:
            seen.append(numbers())
    assert len(set(seen)) == 4
    again = OwnDraws(2)
    with again:
        assert [numbers() for _ in range(4)] == seen
    assert theirs != mine


def test_an_error_inside_gives_the_generators_back() -> None:
    reseed_cpu(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    reseed_cpu(1)
    with pytest.raises(KeyError), OwnDraws(2):
        raise KeyError
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


@pytest.mark.parametrize("kind", [OwnGenerators, Counting])
def test_memory_brings_a_new_object_to_where_an_old_one_was(kind: Any) -> None:
    old = kind()
    memory = Memory(old)
    list(old)
    state = through_a_file(memory.state())
    expected = list(old)
    new = kind()
    assert list(kind()) != expected
    Memory(new).load(state)
    assert list(new) == expected


def test_memory_holds_what_changed_and_nothing_else() -> None:
    class Thing:
        def __init__(self, ranks: int) -> None:
            self.ranks, self.count, self.later = ranks, 0, None
            self.big = torch.zeros(1000)

    old = Thing(2)
    memory = Memory(old)
    assert memory.state() == {}
    old.count, old.path = 3, "x"  # type: ignore[attr-defined]
    assert memory.state() == {"0": {"count": 3, "path": "x"}}
    new = Thing(4)
    there = Memory(new)
    new.count = 9
    there.load(memory.state())
    assert (new.ranks, new.count, new.path) == (4, 3, "x")  # type: ignore[attr-defined]
    there.load({})
    assert new.count == 0


def test_states_of_users_are_packed_for_a_checkpoint() -> None:
    state: dict[str, Any] = {
        "bits": np.random.default_rng(5).bit_generator.state, "old": np.random.MT19937(5).state,
        "numbers": [np.int64(3), np.float32(0.5), (1, "a", None)], "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "tensor": torch.arange(3), "flags": np.array([True, False]),
    }  # fmt: skip
    back = unpack(through_a_file(pack(state)))
    assert back["bits"] == state["bits"]
    assert back["old"]["state"]["key"].dtype == np.uint32
    assert (back["old"]["state"]["key"] == state["old"]["state"]["key"]).all()
    assert back["numbers"] == [3, 0.5, (1, "a", None)]
    assert back["array"].dtype == np.uint16
    assert back["array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back["flags"].tolist() == [True, False]
    assert back["tensor"].tolist() == [0, 1, 2]


def test_packing_copies() -> None:
    state: dict[str, Any] = {"array": np.zeros(2), "tensor": torch.zeros(2), "list": [1]}
    packed = pack(state)
    state["array"][0] = state["tensor"][0] = 1
    state["list"].append(2)
    assert unpack(packed)["array"].tolist() == packed["tensor"].tolist() == [0, 0]
    assert packed["list"] == [1]
