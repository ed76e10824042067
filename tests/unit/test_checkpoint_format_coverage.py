"""Whether pieces make up a tensor, against counting each element."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from trainyard.checkpoint.format.coverage import covers, disjoint
from trainyard.checkpoint.format.geometry import Box, Index


def elements(box: Box) -> list[Index]:
    return list(itertools.product(*(range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))))


def test_covers_says_what_counting_says() -> None:
    rng = random.Random(7)
    seen: Counter[bool] = Counter()
    for _ in range(3000):
        whole = Box.whole(tuple(rng.randint(1, 3) for _ in range(rng.randint(0, 3))))
        pieces = []
        for _ in range(rng.randint(0, 4)):
            offset = tuple(rng.randint(0, n) for n in whole.shape)
            pieces.append(Box(offset, tuple(rng.randint(1, 3) for _ in offset)))
        counts = Counter(e for p in pieces for e in elements(p))
        wanted = counts == Counter(elements(whole))
        assert covers(whole, pieces) == wanted, (whole, pieces)
        assert disjoint(pieces) == all(n == 1 for n in counts.values()), pieces
        seen[wanted] += 1
    assert min(seen.values()) > 50, "both answers must have come up"


def test_two_that_overlap_do_not_hide_a_gap() -> None:
    assert not covers(Box.whole((4,)), [Box((0,), (2,)), Box((1,), (2,))])


def test_of_nothing_any_pieces_of_nothing_are_all() -> None:
    assert covers(Box.whole((0, 3)), [])
    assert covers(Box.whole((4, 0)), [Box((0, 0), (2, 0)), Box((2, 0), (2, 0))])
    assert not covers(Box.whole((0,)), [Box((0,), (1,))])
