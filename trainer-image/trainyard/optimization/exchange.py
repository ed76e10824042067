"""The processes' part of the tree (`fold`): from each one's nodes to the sum of all, on all of them.

Each process adds up one slice of all gradients: it is sent that slice of every process's nodes, computes the rest of the
tree for it, and sends the result to all. So a process sends and receives what a ring all-reduce would, times the number of
its nodes for the first half: no gradient goes through one process, and nothing is added up twice. Measured against the
alternatives in docs/decisions/0008-elastic-determinism.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainyard.data.virtual import block
from trainyard.optimization.fold import Fold, Node, cover

BUCKET_BYTES = 32 << 20
"""Of gradients on their way at a time."""


@dataclass(slots=True)
class Gradients:
    """Of one node."""

    tensors: list[torch.Tensor]
    """Zeros where nothing depended on a parameter."""
    used: list[bool]
    """Whether something did."""


def add(left: Gradients, right: Gradients) -> Gradients:
    """In place of `left`."""
    torch._foreach_add_(left.tensors, right.tensors)
    left.used = [a or b for a, b in zip(left.used, right.used, strict=True)]
    return left


class Exchange:
    """Of process `rank` of `world`, for `leaves` virtual ranks."""

    def __init__(self, rank: int, world: int, leaves: int) -> None:
        self.leaves = leaves
        self.covers = [cover(block(r, world, leaves), leaves) for r in range(world)]
        """By process: its nodes."""
        self.rank, self.world = rank, world

    def total(self, nodes: list[tuple[Node, Gradients]]) -> Gradients:
        """Collective where there are several processes: the root, in the tensors of the first of `nodes`.

        `nodes` are those of `covers[rank]`, with the same tensors on all processes.
        """
        first = nodes[0][1]
        if self.world == 1 or not first.tensors:
            return first
        used = [any(marks) for marks in zip(*(gradients.used for _, gradients in nodes), strict=True)]
        marks = torch.tensor(used, dtype=torch.float32, device=first.tensors[0].device)
        # They add up with the gradients: what is not 0 in the end was used somewhere.
        carried = [[*first.tensors, marks]]
        carried += [[*gradients.tensors, torch.zeros_like(marks)] for _, gradients in nodes[1:]]
        for bucket in buckets(carried[0], BUCKET_BYTES):
            self._add([[tensors[i] for i in bucket] for tensors in carried])
        if not all(used):  # reading them waits for the device: only for who does not know it anyhow
            used = [mark > 0 for mark in marks.tolist()]
        return Gradients(first.tensors, used)

    def _add(self, nodes: list[list[torch.Tensor]]) -> None:
        """`nodes[0]` becomes the sum over all processes' nodes."""
        import torch.distributed as dist

        own, world = nodes[0], self.world
        count = sum(tensor.numel() for tensor in own)
        slice_ = -(-count // world)
        sent = own[0].new_zeros((len(nodes), world * slice_))
        for row, tensors in zip(sent, nodes, strict=True):
            torch.cat([tensor.reshape(-1) for tensor in tensors], out=row[:count])
        sent = sent.view(len(nodes), world, slice_).transpose(0, 1).contiguous()
        counts = [len(nodes_of) for nodes_of in self.covers]
        received = sent.new_empty((sum(counts), slice_))
        size = slice_ * sent.element_size()
        # As bytes: they are only carried, and not every backend carries every type.
        dist.all_to_all_single(
            _bytes(received), _bytes(sent), [n * size for n in counts], [len(nodes) * size] * world
        )
        fold: Fold[torch.Tensor] = Fold(self.leaves, torch.Tensor.add_)
        names = [node for nodes_of in self.covers for node in nodes_of]
        for node, row in zip(names, received, strict=True):
            fold.put(node, row)
        ((_, total),) = fold.take()
        whole = sent.new_empty(world * slice_)
        dist.all_gather_into_tensor(_bytes(whole), _bytes(total))
        for tensor, part in zip(own, whole[:count].split([t.numel() for t in own]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def buckets(tensors: list[torch.Tensor], most: int) -> list[list[int]]:
    """Indices of `tensors`, in their order: each list of one type and at most `most` bytes, or one tensor."""
    found: list[list[int]] = []
    sizes: list[int] = []
    open_: dict[torch.dtype, int] = {}
    for index, tensor in enumerate(tensors):
        size = tensor.numel() * tensor.element_size()
        at = open_.get(tensor.dtype)
        if at is None or sizes[at] + size > most:
            at = open_[tensor.dtype] = len(found)
            found.append([])
            sizes.append(0)
        found[at].append(index)
        sizes[at] += size
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
