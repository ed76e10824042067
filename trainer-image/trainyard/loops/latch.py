"""Whether the weights are those of a completed step, for a thread that looks from outside of the loop."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

from trainyard.failure.errors import PeerFailed

Moment = TypeVar("Moment")


class Latch(Generic[Moment]):
    """Between the loop and whoever saves when a rank has failed.

    The loop says `complete` when all that belongs to a step is done, and `changes` before it begins to change the weights
    again. In between they do not change, whatever the loop is at: reading, forward, backward, waiting for a reduction that
    will never come. `hold` gives what was said last, and keeps the loop from going on to change anything: it fails at
    its next `changes`. Each of the three is under one lock, so it is either the one or the other.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._moment: Moment | None = None
        self._held = False

    def complete(self, moment: Moment) -> None:
        """The state is that of `moment`."""
        with self._turn:
            self._moment = moment
            self._turn.notify_all()

    def changes(self) -> None:
        """From here on the state is that of no step. Raises PeerFailed when somebody holds it."""
        with self._turn:
            if self._held:
                raise PeerFailed("another rank failed, and the state of the last step is being saved")
            self._moment = None

    def hold(self, seconds: float) -> Moment | None:
        """From now on nothing changes. Waits for the loop to complete what it is at; None: it did not."""
        with self._turn:
            self._turn.wait_for(lambda: self._moment is not None, timeout=seconds)
            self._held = True
            return self._moment
