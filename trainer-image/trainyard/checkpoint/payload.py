"""What a rank gives to a save."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What this rank has to say, not copied: it is read before `save_shard` returns."""

    checkpoint: dict[str, Any]
    """The same on all ranks, as far as they have it: rank 0's counts for all but sharded tensors."""
    own: dict[str, Any]
    """What only this rank knows."""
    replicated: Collection[str] = field(default_factory=frozenset)
    """Names (dotted paths, as `flatten` gives) of tensors that are equal on all ranks: any of them may write them."""
