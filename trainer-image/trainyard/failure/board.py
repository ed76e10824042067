"""What the ranks tell each other when something goes wrong: a few keys of the store that they met at.

Connections of its own: a connection that waits takes no other word meanwhile, and the training's own one may be waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from trainyard.failure.cause import Cause

STOP, TARGET, ERROR = range(3)
"""What a rank waits for, in this order. An error comes at any time."""
_WAIT = timedelta(hours=1)
"""Of one call; there is another one after it."""
_TALK = timedelta(seconds=5)


class Board:
    """Of one rank. `store` is a torch.distributed.Store that is connected, `prefix` that of all keys."""

    def __init__(self, store: Any, prefix: str, rank: int, world: int) -> None:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        self.rank, self.world = rank, world
        own = PrefixStore(prefix, store)
        # Both now: a connection cannot be made any more when it is needed to say that all is lost.
        self._listener, self._talker = own.clone(), own.clone()
        self._talker.set_timeout(_TALK)
        self._talking = threading.Lock()

    # ---- waiting

    def wait(self, stage: int, closed: Callable[[], bool]) -> None:
        """Until there is news of this stage or `wake` was called. Raises torch.distributed.DistError without a store."""
        from torch.distributed import DistStoreError

        while not closed():
            try:
                self._listener.wait([self._wake_key(self.rank, stage)], _WAIT)
                return
            except DistStoreError as error:
                if "timeout" not in str(error):
                    raise

    def wake(self) -> None:
        """Ends this rank's own waits, now and later."""
        self._wake([self.rank], (STOP, TARGET, ERROR))

    # ---- telling; each raises RuntimeError when the store does not answer

    def request_stop(self, by: str) -> None:
        self._talk(lambda s: s.compare_set("stop", "", by))
        self._wake(range(self.world), (STOP,))

    def requested_by(self) -> str:
        """Empty: nobody did."""
        return self._read("stop")

    def post(self, number: int) -> None:
        """This rank's number. Whoever is the last to say his works out the target."""
        self._talk(lambda s: s.set(f"at/{self.rank}", str(number)))
        if self._talk(lambda s: s.add("posts", 1)) == self.world:
            keys = [f"at/{rank}" for rank in range(self.world)]
            target = max(int(n) for n in self._talk(lambda s: s.multi_get(keys)))
            self._talk(lambda s: s.set("target", str(target)))
            self._wake(range(self.world), (TARGET,))

    def await_posts(self) -> None:
        """Until all ranks have said their number."""
        self._talk(lambda s: s.wait(["target"], _TALK))

    def target(self) -> int | None:
        text = self._read("target")
        return int(text) if text else None

    def fail(self, cause: Cause) -> Cause:
        """The first cause of all, which is the given one if there was none."""
        first = self._talk(lambda s: s.compare_set("error", "", cause.to_json()))
        self._wake(range(self.world), (STOP, TARGET, ERROR))
        return Cause.from_json(first)

    def agree(self, word: str, seconds: float) -> list[str]:
        """Everybody's word, by rank; once in a board's life. Raises RuntimeError when not all have said theirs by then."""
        keys = [f"word/{rank}" for rank in range(self.world)]
        self._talk(lambda s: s.set(keys[self.rank], word))
        self._talk(lambda s: s.wait(keys, timedelta(seconds=seconds)))
        return [said.decode() for said in self._talk(lambda s: s.multi_get(keys))]

    def error(self) -> Cause | None:
        text = self._read("error")
        return Cause.from_json(text) if text else None

    # ---- the store

    @staticmethod
    def _wake_key(rank: int, stage: int) -> str:
        return f"wake/{rank}/{stage}"

    def _wake(self, ranks: Any, stages: tuple[int, ...]) -> None:
        keys = [self._wake_key(rank, stage) for rank in ranks for stage in stages]
        self._talk(lambda s: s.multi_set(keys, ["1"] * len(keys)))

    def _read(self, key: str) -> str:
        return self._talk(lambda s: s.get(key).decode() if s.check([key]) else "")  # type: ignore[no-any-return]

    def _talk(self, call: Callable[[Any], Any]) -> Any:
        if not self._talking.acquire(timeout=_TALK.total_seconds()):
            raise RuntimeError("the store that the ranks met at does not answer")
        try:
            return call(self._talker)
        finally:
            self._talking.release()


def find_store() -> Any:
    """The store of the default process group; None without one that can be waited at."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    under: Any = store
    while isinstance(under, PrefixStore):
        under = under.underlying_store
    return store if isinstance(under, TCPStore) else None
