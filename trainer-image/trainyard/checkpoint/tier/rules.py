"""What a node keeps and with whom it shares it, as pure functions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

from trainyard_api.checkpoints import SAFE_KEY

Save = tuple[int, int]
"""attempt, step: in the order in which they come to be."""
T = TypeVar("T")


def surplus(held: Collection[Save], *, committed: Save | None, in_flight: Collection[Save]) -> set[Save]:
    """Which of the saves that lie uploaded on this node are to go.

    `committed` is the newest commit that the node has heard of. Of one that is uploaded nobody may ever tell it whether
    it was committed; once the next save is in flight, that is decided: what was not said to be committed by then was
    dropped, unless nothing was ever said. So there are never more than two saves here.
    """
    old = {save for save in held if committed is not None and save < committed}
    rest = set(held) - old - set(in_flight)
    if not rest:
        return old
    keep = {committed if committed in rest else max(rest)}
    if not in_flight:
        keep |= set(sorted(rest)[-2:])
    return old | (rest - keep)


def ring(nodes: Sequence[T], me: int, copies: int) -> list[T]:
    """The nodes that take copies from node `me`: the next ones, never itself, none twice."""
    count = min(copies, len(nodes) - 1)
    return [nodes[(me + distance) % len(nodes)] for distance in range(1, count + 1)]


def save_of(key: str) -> Save:
    """The save to which a shard belongs. Raises ValueError for what is not the key of a shard."""
    if not SAFE_KEY.fullmatch(key):
        raise ValueError(f"{key[:100]!r} is not the key of a shard")
    _, step, attempt, _ = key.split("/")
    return int(attempt[1:]), int(step.removeprefix("step-"))
