"""Who writes which piece. Every rank computes it for itself, from what it has: no message is sent for a save.

What several ranks have is cut among them by McNaughton's wrap-around rule ("Scheduling with deadlines and loss functions",
1959): the tensors, laid end to end in the order of their names, are cut into one stretch of equal length for each rank. That
balances better than whole tensors can be handed out, with fewer cuts than there are ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainyard.checkpoint.format.geometry import Box, Index, Piece, piece

if TYPE_CHECKING:
    import torch

LEAST_CUT = 64 << 10
"""Bytes: a smaller tensor is not cut."""


def rank_path(rank: int) -> str:
    """What the names of a rank's own tensors begin with, among those of all ranks."""
    return f"rank-{rank:05d}"


@dataclass(frozen=True, slots=True)
class Assigned:
    """What this rank writes of a tensor."""

    name: str
    local: torch.Tensor
    """A view, not a copy; of any strides, on any device."""
    box: Box
    whole: Index
    rows: tuple[int, int] | None = None
    """[begin, end) of what this rank has, along the first dimension, if that is not all of it."""


def assign(
    tensors: Mapping[str, torch.Tensor], *, rank: int, world: int, replicated: Collection[str] = ()
) -> list[Assigned]:
    """What rank `rank` of `world` writes of its `tensors`, sorted by name.

    Names under `rank_path` are this rank's own. A DTensor's piece is written once by those that have it. `replicated` are the
    plain tensors that all ranks have alike, by name, shape and dtype; each is written once. Any other plain tensor, and
    a DTensor without elements, is rank 0's (or that of the lowest rank in its mesh). No empty pieces but of tensors that
    are empty as a whole. What is shared by the same ranks is balanced: none gets more than its fair share of the bytes
    plus the largest indivisible unit (a row; a tensor of less than LEAST_CUT). Raises CheckpointConfigError.
    """
    found: list[Assigned] = []
    shared: dict[Index, list[tuple[str, Piece]]] = {}
    everyone, own = tuple(range(world)), rank_path(rank)
    for name, tensor in tensors.items():
        have = piece(tensor)
        if name == own or name.startswith(f"{own}."):
            # How it lies in a mesh means nothing to the rank that takes it over.
            shape = tuple(have.local.shape)
            found.append(Assigned(name, have.local, Box.whole(shape), shape))
        elif 0 in have.whole:
            if rank == (have.holders or everyone)[0]:
                found.append(
                    Assigned(name, have.local.new_empty(have.whole), Box.whole(have.whole), have.whole)
                )
        elif have.box.numel:
            holders = have.holders or (everyone if name in replicated else everyone[:1])
            shared.setdefault(holders, []).append((name, have))
    for holders, pieces in shared.items():
        if rank in holders:
            found += _share(pieces, holders.index(rank), len(holders))
    return sorted(found, key=lambda a: a.name)


def _share(pieces: Iterable[tuple[str, Piece]], number: int, count: int) -> Iterator[Assigned]:
    """What the `number`-th of `count` ranks that all have `pieces` writes of them."""
    ordered = sorted(pieces, key=lambda p: p[0])
    units = [_units(have) for _, have in ordered]
    for (name, have), (begin, end) in zip(ordered, stretch(units, number, count), strict=True):
        if begin == end:
            continue
        local, box, rows = have.local, have.box, None
        if end - begin < _units(have)[0]:
            local, rows = local[begin:end], (begin, end)
            box = Box((box.offset[0] + begin, *box.offset[1:]), (end - begin, *box.shape[1:]))
        yield Assigned(name, local, box, have.whole, rows)


def _units(have: Piece) -> tuple[int, int]:
    """(count, bytes of each): what a piece may be cut into."""
    size = have.box.numel * have.local.element_size()
    if not have.box.shape or size < LEAST_CUT:
        return 1, size
    return have.box.shape[0], size // have.box.shape[0]


def stretch(units: Sequence[tuple[int, int]], number: int, count: int) -> list[tuple[int, int]]:
    """For each thing of (units, bytes of a unit) the range of its units that is the `number`-th of `count` ranks': those
    whose middle lies in this rank's stretch of all bytes."""
    total = sum(n * length for n, length in units)
    found, at = [], 0
    for n, length in units:
        # The first unit i with at + (i + 1/2) * length >= border, border = k * total / count; in whole numbers.
        begin, end = (
            min(max(-(((2 * at + length) * count - 2 * k * total) // (2 * length * count)), 0), n)
            for k in (number, number + 1)
        )
        found.append((begin, end))
        at += n * length
    return found
