"""Buffers that each rank has of its own, such as the running statistics of batch normalisation over its own batches.

The weights of a checkpoint have rank 0's. For the other ranks to go on exactly, theirs go into their own part: an unbroken
run would validate with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainyard.core.module import LightningModule


SMALL = 1 << 20
"""Bytes. A larger buffer, a table or a mask, is only kept if its version says that it has changed since the fit began; of
batch normalisation's the version says nothing."""


class OwnBuffers:
    """Of one fit, on one rank."""

    def __init__(self, module: LightningModule, rank: int) -> None:
        """`rank` 0 has none beside the checkpoint's."""
        self._module = module
        self._kept = rank > 0
        self._versions = {name: buffer._version for name, buffer in self._buffers()}

    def state(self) -> dict[str, torch.Tensor]:
        """Not copied."""
        return {
            name: buffer.detach()
            for name, buffer in self._buffers()
            if self._kept and (_small(buffer) or buffer._version != self._versions.get(name))
        }

    def load_state(self, saved: dict[str, torch.Tensor]) -> None:
        """What the module does not have any more, or has in another shape, is passed over."""
        there = dict(self._buffers())
        with torch.no_grad():
            for name, value in saved.items():
                if name in there and there[name].shape == value.shape:
                    there[name].copy_(value)
                    self._versions[name] = -1  # it has changed, in the life before

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those that are in the module's state_dict, and whole here."""
        transient: set[Any] = set()
        for path, part in self._module.named_modules():
            prefix = f"{path}." if path else ""
            transient |= {prefix + name for name in part._non_persistent_buffers_set}
        for name, buffer in self._module.named_buffers():
            if name not in transient and not isinstance(buffer, DTensor) and not buffer.is_meta:
                yield name, buffer


def _small(buffer: torch.Tensor) -> bool:
    return buffer.numel() * buffer.element_size() <= SMALL
