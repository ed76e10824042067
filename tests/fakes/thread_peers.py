"""Ranks that are threads of one process, with the collectives of `trainyard.peers.Peers`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import torch

BOUND_SECONDS = 30.0


class _Meeting:
    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.values: list[Any] = [None] * world


class ThreadPeers:
    """A rank that does not come to a collective breaks it for all, after 30 s at the latest."""

    def __init__(self, rank: int, world: int, meeting: _Meeting) -> None:
        self.rank, self.world, self._meeting = rank, world, meeting

    def _exchange(self, what: str, value: Any) -> list[Any]:
        meeting = self._meeting
        meeting.values[self.rank] = (what, value)
        meeting.barrier.wait(BOUND_SECONDS)
        values = list(meeting.values)
        meeting.barrier.wait(BOUND_SECONDS)
        kinds = {kind for kind, _ in values}
        assert kinds == {what}, f"ranks are at different collectives: {kinds}"
        return [v for _, v in values]

    def broadcast(self, value: Any) -> Any:
        return json.loads(self._exchange("broadcast", json.dumps(value))[0])

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(v) for v in self._exchange("gather", json.dumps(value))]

    def any(self, flag: bool) -> bool:
        return any(self._exchange("any", flag))

    def share(self, buffer: torch.Tensor, owner: int, *, whole: bool = True) -> bool:
        given, said = self._exchange("share", (buffer.clone(), whole))[owner]
        assert given.shape == buffer.shape
        if said:
            buffer.copy_(given)
        return bool(said)


def run_ranks(world: int, work: Callable[[ThreadPeers], Any]) -> list[Any]:
    """What `work` returns, or the exception that it raises, by rank."""
    meeting = _Meeting(world)
    found: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadPeers(rank, world, meeting))
        except Exception as error:
            found[rank] = error
            if not isinstance(error, threading.BrokenBarrierError) and not getattr(error, "exit_code", None):
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * BOUND_SECONDS)
    return found
