"""Between a loop and whoever saves its state: it is either that of a completed step, and stays so, or nobody gets it."""

from __future__ import annotations

import threading
import time

import pytest

from trainyard.failure.errors import PeerFailed
from trainyard.loops.latch import Latch


def test_before_the_first_step_and_within_a_step_there_is_nothing() -> None:
    latch: Latch[int] = Latch()
    assert latch.hold(0.0) is None
    latch = Latch()
    latch.complete(1)
    latch.changes()
    assert latch.hold(0.0) is None


def test_what_is_held_does_not_change_any_more() -> None:
    latch: Latch[int] = Latch()
    latch.complete(1)
    assert latch.hold(0.0) == 1
    for _ in range(2):
        with pytest.raises(PeerFailed, match="is being saved"):
            latch.changes()
    assert latch.hold(0.0) == 1


def test_the_loop_may_complete_what_it_is_at() -> None:
    latch: Latch[int] = Latch()
    latch.complete(1)
    latch.changes()
    soon = threading.Timer(0.05, latch.complete, (2,))
    soon.start()
    assert latch.hold(10.0) == 2
    soon.join()


class Loop(threading.Thread):
    """Its state is a pair whose halves differ within a step."""

    def __init__(self, latch: Latch[int]) -> None:
        super().__init__()
        self.latch, self.state, self.ended = latch, [0, 0], False

    def run(self) -> None:
        step = 0
        while True:
            self.latch.complete(step)
            try:
                self.latch.changes()
            except PeerFailed:
                self.ended = True
                return
            step += 1
            self.state[0] = step
            self.state[1] = step


def test_whatever_the_two_threads_do_the_state_is_that_of_the_moment() -> None:
    for _ in range(30):
        latch: Latch[int] = Latch()
        loop = Loop(latch)
        loop.start()
        time.sleep(0.0005)
        moment = latch.hold(5.0)
        assert loop.state == [moment, moment]
        loop.join(5.0)
        assert loop.ended
        assert loop.state == [moment, moment]
