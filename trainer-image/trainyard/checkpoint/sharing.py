"""What all ranks need is fetched by one of them and handed to the others over their own network.

Of a model that each rank holds whole, n ranks would else read n times all shards. Here rank i reads the shards with numbers
i, i + n...: after a restart in place, those that lie on its own node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from trainyard.checkpoint.errors import CheckpointError, ShardInvalid
from trainyard.peers import Peers

if TYPE_CHECKING:
    import torch

AHEAD = 4
"""Parts that each rank fetches beyond the one that it hands out."""


class Item:
    """One part. All ranks make the same list of them."""

    def __init__(
        self, owner: int, size: int, fetch: Callable[[memoryview], None], take: Callable[[memoryview], None]
    ) -> None:
        self.owner = owner
        self.size = size
        """Bytes."""
        self.fetch = fetch
        """Fills the buffer; called on the owner only, in a thread. Raises CheckpointError."""
        self.take = take
        """Uses what is in the buffer, which is valid until it returns; called on every rank, the owner too."""


def hand_round(items: Sequence[Item], peers: Peers) -> None:
    """Collective: each item's content from its owner to all, in this order. Memory: AHEAD + 1 parts.

    If an owner cannot fetch, all ranks stop at that item: the owner raises what it met, the others ShardInvalid.
    """
    import torch

    mine = deque(item for item in items if item.owner == peers.rank)
    fetched: deque[tuple[torch.Tensor, Future[None]]] = deque()
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="checkpoint-share") as pool:

        def look_ahead() -> None:
            while mine and len(fetched) <= AHEAD:
                item = mine.popleft()
                buffer = torch.empty(item.size, dtype=torch.uint8)
                fetched.append((buffer, pool.submit(item.fetch, memoryview(buffer.numpy()))))

        look_ahead()
        spare: torch.Tensor | None = None
        for item in items:
            error: CheckpointError | None = None
            if item.owner == peers.rank:
                buffer, done = fetched.popleft()
                try:
                    done.result()
                except CheckpointError as problem:
                    error = problem
            else:
                if spare is None or spare.numel() < item.size:
                    spare = torch.empty(item.size, dtype=torch.uint8)
                buffer = spare[: item.size]
            if not peers.share(buffer, item.owner, whole=error is None):
                pool.shutdown(wait=False, cancel_futures=True)
                raise error or ShardInvalid(f"rank {item.owner} could not read its part")
            item.take(memoryview(buffer.numpy()))
            look_ahead()
