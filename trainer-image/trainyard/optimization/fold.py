"""Sums in an order that does not depend on who adds: over virtual ranks, along one binary tree.

The leaves are the virtual ranks, and a node of several of them is the sum of its two halves. A process that has a
contiguous block of leaves can add up those nodes that lie within its block whole (`cover`): one, if the block is itself a
node, and at most 2*log2(V). What is left of the tree is computed from all processes' nodes, anywhere. Floating point
addition is not associative; here nobody ever associates otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Generic, TypeVar

Node = tuple[int, int]
"""Of the leaves [low, high)."""
Value = TypeVar("Value")


def halves(node: Node) -> tuple[Node, Node]:
    low, high = node
    middle = low + (high - low) // 2
    return (low, middle), (middle, high)


@lru_cache(maxsize=64)
def parents(leaves: int) -> dict[tuple[Node, Node], Node]:
    """By its two halves: each node that has some, of the tree over `leaves` leaves."""
    found: dict[tuple[Node, Node], Node] = {}
    open_ = [(0, leaves)]
    while open_:
        node = open_.pop()
        if node[1] - node[0] > 1:
            found[halves(node)] = node
            open_ += halves(node)
    return found


def cover(block: range, leaves: int) -> list[Node]:
    """The fewest nodes that make up `block`, from left to right."""
    found: list[Node] = []
    open_: list[Node] = [(0, leaves)]
    while open_:
        node = open_.pop()
        low, high = node
        if high <= block.start or low >= block.stop:
            continue
        if block.start <= low and high <= block.stop:
            found.append(node)
        else:
            left, right = halves(node)
            open_ += [right, left]
    return found


class Fold(Generic[Value]):
    """Takes adjacent nodes from left to right, and adds what can be added as soon as it can be."""

    def __init__(self, leaves: int, add: Callable[[Value, Value], Value]) -> None:
        """`add(left, right)` may use up both."""
        self._parents, self._add = parents(leaves), add
        self._stack: list[tuple[Node, Value]] = []

    def put(self, node: Node, value: Value) -> None:
        stack = self._stack
        while stack and (parent := self._parents.get((stack[-1][0], node))) is not None:
            value = self._add(stack.pop()[1], value)
            node = parent
        stack.append((node, value))

    def take(self) -> list[tuple[Node, Value]]:
        """What there is, from left to right; empty from then on."""
        found, self._stack = self._stack, []
        return found
