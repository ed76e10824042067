"""From bytes in a file to where they belong in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainyard.checkpoint.format.geometry import Box
from trainyard.checkpoint.format.shardfile import Entry

if TYPE_CHECKING:
    import torch


class Run:
    """The bytes [begin, end) of a file go, in their order, into one stretch of memory."""

    def __init__(
        self, begin: int, end: int, memory: torch.Tensor, elements: int,
        then: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.begin, self.end = begin, end
        self.elements = elements
        """Of the target, that this run fills."""
        self._memory = _bytes_of(memory)
        self._then = then

    def window(self, begin: int, end: int) -> memoryview | None:
        """Where the file's bytes [begin, end) go, if all of them do."""
        if begin < self.begin or end > self.end:
            return None
        return self._memory[begin - self.begin : end - self.begin]

    def take(self, at: int, data: memoryview) -> None:
        """`data` is the file's content from byte `at` on."""
        begin, end = max(at, self.begin), min(at + len(data), self.end)
        if begin < end:
            self._memory[begin - self.begin : end - self.begin] = data[begin - at : end - at]

    def finish(self) -> None:
        """All bytes are there."""
        if self._then is not None:
            target, source = self._then
            target.copy_(source)


def runs_of(entry: Entry, box: Box, target: torch.Tensor) -> Iterator[Run]:
    """What of the piece `entry` belongs into `target`, which is the contiguous piece `box` of the same tensor.

    Rows of both that lie together are one run straight to the target. Else (pieces cut along another dimension) the rows
    come into a tensor of their own first. Raises ShardInvalid for another dtype.
    """
    import torch

    from trainyard.checkpoint.errors import ShardInvalid

    if entry.torch_dtype != target.dtype:
        raise ShardInvalid(f"{entry.name}: is {entry.torch_dtype}, wanted as {target.dtype}")
    if len(entry.box.shape) != len(box.shape):
        raise ShardInvalid(
            f"{entry.name}: has {len(entry.box.shape)} dimensions, wanted with {len(box.shape)}"
        )
    if not target.numel():
        return
    both = entry.box.overlap(box)
    if both is None:
        return
    size = target.element_size()
    if not both.shape:
        yield Run(entry.begin, entry.end, target, 1)
        return
    row = size  # bytes of one index of the first dimension, in the file
    for length in entry.box.shape[1:]:
        row *= length
    begin = entry.begin + (both.offset[0] - entry.box.offset[0]) * row
    end = begin + both.shape[0] * row
    if both.shape[1:] == entry.box.shape[1:] == box.shape[1:]:
        first = both.offset[0] - box.offset[0]
        yield Run(begin, end, target[first : first + both.shape[0]], both.numel)
        return
    rows = Box((both.offset[0], *entry.box.offset[1:]), (both.shape[0], *entry.box.shape[1:]))
    whole = torch.empty(rows.shape, dtype=target.dtype)
    yield Run(begin, end, whole, both.numel, (target[both.within(box)], whole[both.within(rows)]))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory itself, not a copy."""
    import torch

    flat = tensor.reshape(-1) if tensor.dim() == 0 else tensor.view(-1)
    return memoryview(flat.view(torch.uint8).numpy())
