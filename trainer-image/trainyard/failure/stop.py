"""Where all ranks stop when any of them is asked to: agreed upon without a collective, and without a message per step.

Each rank numbers what it does, and writes down the number of what it is about to begin *before* it looks whether a
stop was asked for. The watcher's thread first says that it was, and then reads that number. Whichever way the two
threads interleave, either the loop sees the wish before it begins the next thing, or the watcher's reading includes that
thing (Dekker's argument; it needs the GIL's sequential consistency). So no rank ever gets beyond the number that was read
of it without knowing; the target is the greatest number that was read of any rank, and all ranks can reach it, because
what has been begun by one rank will be begun by the others.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from trainyard.failure.errors import PeerFailed, StopFailed

PATIENCE_SECONDS = 6.0
"""How long a rank that stands still waits for the others' numbers."""
INNER = 1 << 24
"""Numbers between two batches of the training: the batches of a validation, and its end."""
LAST = INNER - 1
"""What follows the last batch of a validation: `inner` of `GracefulStop.begins`."""
FINISHED = 1 << 62

Rescue = Callable[[BaseException | None, float, Callable[[str, float], list[str]] | None], None]
"""(error of this rank's, None for another one's; seconds; how to agree with the others, None without a way to): never raises."""


class GracefulStop:
    """The loop's side: `begins` before each thing that other ranks may have to take part in.

    A world of one stops before the next thing that it begins.
    """

    def __init__(
        self, world: int = 1, patience: float = PATIENCE_SECONDS, left: Callable[[], float] = lambda: math.inf
    ) -> None:
        self.world = world
        self.seconds_left = left
        """Until the process ends in any case; infinity if nothing ends it."""
        self.rescue: Rescue | None = None
        """What saves the last complete step when a rank fails; set by the loop."""
        self.armed = False
        """Somebody wants the run to stop: ask `target`. An attribute, so that looking costs nothing."""
        self.started = 0
        """The number of what this rank has begun."""
        self.requested_by = ""
        self.acted = False
        """`begins` has said that this is the end."""
        self._patience = patience
        self._decided = threading.Event()
        self._target = FINISHED
        self._failure = ""

    # ---- the loop's side

    def announce(self, batch: int, inner: int = 0) -> None:
        """As `begins`, where it is not possible to stop: the optimizer has not stepped since the last batch."""
        self.started = batch * INNER + inner

    def begins(self, batch: int, inner: int = 0) -> bool:
        """Whether to stop, on all ranks alike, instead of beginning with training batch `batch` of this fit (from 1).

        `inner`: with the batch of this number (from 1) of the validation that follows `batch`, over all loaders; `LAST`
        for what follows the last of them. Numbers may be left out, and need not be the same on all ranks except
        those of batches. Raises StopFailed, PeerFailed.
        """
        self.started = number = batch * INNER + inner
        if not self.armed:
            return False
        self.acted = self.target() < number
        return self.acted

    def target(self) -> int:
        """The number of the last thing to do; waits for the others' word. Raises StopFailed, PeerFailed."""
        if self.world == 1:
            return self.started - 1
        decided = self._decided.wait(self._patience)
        if self._failure:
            raise PeerFailed(self._failure)
        if not decided:
            raise StopFailed(
                f"{self.requested_by or 'a rank was asked to stop'}, but not all of {self.world} ranks said within "
                f"{self._patience:g} s where they are: a rank is dead, or its process does not get to run"
            )
        return self._target

    @property
    def batch(self) -> int:
        """After which training batch of this fit the run stops. As `target`."""
        return self.target() // INNER

    # ---- the watcher's side

    def arm(self, requested_by: str) -> int:
        """Tells the loop, and returns this rank's number: in this order, see above. May be called again."""
        self.requested_by = self.requested_by or requested_by
        self.armed = True
        return self.started

    def decide(self, target: int) -> None:
        """All numbers are there."""
        self._target = target
        self._decided.set()

    def fail(self, message: str) -> None:
        """Another rank failed: there is nothing to agree upon any more. The loop learns it at its next look."""
        self._failure = message
        self.armed = True
        self._decided.set()
