"""Whether pieces make up a tensor: each element once."""

from __future__ import annotations

from collections.abc import Sequence

from trainyard.checkpoint.format.geometry import Box


def covers(whole: Box, pieces: Sequence[Box]) -> bool:
    """Whether `pieces` are inside of `whole`, do not overlap, and leave nothing out.

    To count elements is not enough: two that overlap may hide a gap of the same size.
    """
    if whole.numel == 0:
        return all(p.numel == 0 for p in pieces)
    if any(len(p.shape) != len(whole.shape) or p.overlap(whole) != p for p in pieces):
        return False
    return sum(p.numel for p in pieces) == whole.numel and disjoint(pieces)


def disjoint(pieces: Sequence[Box]) -> bool:
    """Whether no element is in two of them. They have the same number of dimensions.

    A sweep along the dimension in which they begin at the most places.
    """
    if len(pieces) < 2:
        return True
    if not pieces[0].shape:
        return False  # a scalar, twice
    axis = max(range(len(pieces[0].shape)), key=lambda d: len({p.offset[d] for p in pieces}))
    active: list[Box] = []
    for piece in sorted(pieces, key=lambda p: p.offset[axis]):
        begin = piece.offset[axis]
        active = [a for a in active if a.offset[axis] + a.shape[axis] > begin]
        if any(a.overlap(piece) is not None for a in active):
            return False
        active.append(piece)
    return True
