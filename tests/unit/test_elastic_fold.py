"""Sums along the tree, and exact sums: the same however the work is divided."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainyard.data.virtual import block
from trainyard.logged.exact import ExactSum, reduced
from trainyard.optimization.exchange import buckets
from trainyard.optimization.fold import Fold, cover

SIZES = st.integers(1, 40).flatmap(lambda v: st.tuples(st.just(v), st.integers(1, v)))


def written(virtual: int, world: int) -> str:
    """The sum as it is computed, with its parentheses."""
    last: Fold[str] = Fold(virtual, lambda a, b: f"({a}+{b})")
    for rank in range(world):
        own = block(rank, world, virtual)
        fold: Fold[str] = Fold(virtual, lambda a, b: f"({a}+{b})")
        for leaf in own:
            fold.put((leaf, leaf + 1), str(leaf))
        nodes = fold.take()
        assert [node for node, _ in nodes] == cover(own, virtual)
        for node, value in nodes:
            last.put(node, value)
    ((node, value),) = last.take()
    assert node == (0, virtual)
    return value


@given(SIZES)
def test_every_division_associates_alike(sizes: tuple[int, int]) -> None:
    virtual, world = sizes
    assert written(virtual, world) == written(virtual, 1)


@given(SIZES)
def test_a_process_sends_few_nodes(sizes: tuple[int, int]) -> None:
    virtual, world = sizes
    for rank in range(world):
        own = block(rank, world, virtual)
        assert len(cover(own, virtual)) <= max(1, 2 * math.ceil(math.log2(max(2, virtual))))
    if virtual & (virtual - 1) == 0 and world & (world - 1) == 0:
        assert all(len(cover(block(r, world, virtual), virtual)) == 1 for r in range(world))


def test_blocks_are_contiguous_and_even() -> None:
    blocks = [block(rank, 5, 12) for rank in range(5)]
    assert [v for own in blocks for v in own] == list(range(12))
    assert {len(own) for own in blocks} == {2, 3}


def test_buckets_keep_types_apart_and_sizes_small() -> None:
    import torch

    tensors = [
        torch.zeros(n, dtype=d) for n, d in [(3, torch.float32), (3, torch.bfloat16), (4, torch.float32)]
    ]
    assert buckets(tensors, 28) == [[0, 2], [1]]
    assert buckets(tensors, 27) == [[0], [1], [2]], "what is too large goes by itself"


@given(st.lists(st.floats(width=64), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_exact_sums_do_not_depend_on_order_or_division(values: list[float], dice: random.Random) -> None:
    one = ExactSum()
    for value in values:
        one.add(value, 3)
    shuffled = dice.sample(values, len(values))
    cut = dice.randrange(len(values) + 1)
    left, right = ExactSum(), ExactSum()
    for value in shuffled[:cut]:
        left.add(value, 3)
    for value in shuffled[cut:]:
        right.add(value, 3)
    left = ExactSum.from_state(left.to_state())
    left.merge(right)
    found, expected = left.over(Fraction(7)), one.over(Fraction(7))
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_exact_sums_round_once() -> None:
    total = ExactSum()
    for value in (1e300, 1.0, -1e300):
        total.add(value)
    assert float(total) == 1.0
    total.add(math.inf)
    assert float(total) == math.inf
    total.add(-math.inf)
    assert math.isnan(float(total))
    assert math.isnan(ExactSum().over(Fraction(0)))
    huge = ExactSum()
    for _ in range(3):
        huge.add(-1.7e308)
    assert float(huge) == -math.inf


@pytest.mark.parametrize(("how", "expected"), [("mean", 2.0), ("sum", 6.0), ("min", 1.0), ("max", 3.0)])
def test_reductions(how: str, expected: float) -> None:
    assert reduced([3.0, 1.0, 2.0], how) == expected
    assert math.isnan(reduced([], how))
    assert math.isnan(reduced([1.0, math.nan], how))
