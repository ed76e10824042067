"""All ranks stop after the same batch, however the threads of all ranks take turns.

The real `GracefulStop`, with a model of the rest: each rank has a loop and a watcher, a batch is a collective (nobody
gets out of it before everybody is in it), and the store is a set of variables. A scheduler that hypothesis steers decides
before each access to what two threads share who goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainyard.failure.stop import FINISHED, INNER, LAST, GracefulStop

BOUND_SECONDS = 20


class Stuck(AssertionError):
    """No thread can go on."""


@dataclass
class Task:
    name: str
    body: Callable[[], None]
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    until: Callable[[], bool] = lambda: True
    done: bool = False
    error: BaseException | None = None


class Turns:
    """Lets one thread run at a time, from one `point` to its next."""

    def __init__(self, choices: list[int]) -> None:
        self.choices = iter(choices)
        self.tasks: list[Task] = []
        self.back = threading.Semaphore(0)
        self.local = threading.local()
        self.over = False

    def point(self, until: Callable[[], bool] = lambda: True) -> None:
        """Somebody else may go on here; this one does when `until`."""
        task: Task | None = getattr(self.local, "task", None)
        if task is None:
            return
        task.until = until
        self.back.release()
        task.turn.acquire()
        if self.over:
            raise SystemExit

    def add(self, name: str, body: Callable[[], None]) -> None:
        self.tasks.append(Task(name, body))

    def run(self) -> None:
        threads = [threading.Thread(target=self._run, args=(t,), daemon=True) for t in self.tasks]
        for thread in threads:
            thread.start()
        for _ in self.tasks:
            assert self.back.acquire(timeout=BOUND_SECONDS)
        try:
            while not all(t.done for t in self.tasks):
                ready = [t for t in self.tasks if not t.done and t.until()]
                if not ready:
                    raise Stuck(", ".join(t.name for t in self.tasks if not t.done))
                ready[next(self.choices, 0) % len(ready)].turn.release()
                assert self.back.acquire(timeout=BOUND_SECONDS)
        finally:
            self.over = True
            for task in self.tasks:
                task.turn.release()
            for thread in threads:
                thread.join(BOUND_SECONDS)
        for task in self.tasks:
            if task.error is not None:
                raise task.error

    def _run(self, task: Task) -> None:
        self.local.task = task
        try:
            self.point()
            task.body()
        except SystemExit:
            pass
        except BaseException as error:
            task.error = error
        finally:
            task.done = True
            self.back.release()


class Watched(GracefulStop):
    """With a turn before each access to what two threads share, and a store in place of the event."""

    def __init__(self, turns: Turns, world: int) -> None:
        object.__setattr__(self, "turns", turns)
        super().__init__(world)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("armed", "started"):
            self.turns.point()
        object.__setattr__(self, name, value)

    def __getattribute__(self, name: str) -> Any:
        if name in ("armed", "started"):
            object.__getattribute__(self, "turns").point()
        return object.__getattribute__(self, name)

    def target(self) -> int:
        self.turns.point(self._decided.is_set)
        return super().target()


class Careless(Watched):
    """Looks first and announces afterwards: what the model must find fault with."""

    def begins(self, batch: int, inner: int = 0) -> bool:
        if self.armed and self.target() < batch * INNER + inner:
            self.acted = True
            return True
        self.started = batch * INNER + inner
        return False


@dataclass
class Gang:
    turns: Turns
    world: int
    batches: int
    accumulate: int
    validate_after: set[int]
    validation: list[int]
    """Batches of each rank's validation."""
    kind: type[Watched]
    inside: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    posts: dict[int, int] = field(default_factory=dict)
    asked: bool = False
    target: int | None = None
    ends: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """By rank: the last training batch, and whether the validation after it was left out or given up."""

    def __post_init__(self) -> None:
        self.stops = [self.kind(self.turns, self.world) for _ in range(self.world)]

    def collective(self, rank: int, name: tuple[int, int]) -> None:
        self.inside.setdefault(name, set()).add(rank)
        self.turns.point(lambda: len(self.inside[name]) == self.world)

    def post(self, rank: int, number: int) -> None:
        self.turns.point()
        self.posts[rank] = number
        if len(self.posts) == self.world:
            self.target = max(self.posts.values())

    def watcher(self, rank: int) -> None:
        self.turns.point(lambda: self.asked or rank in self.ends)
        if not self.asked or rank in self.ends:
            self.post(rank, FINISHED)
            return
        self.post(rank, self.stops[rank].arm("SIGTERM"))
        self.turns.point(lambda: self.target is not None)
        self.stops[rank].decide(self.target)  # type: ignore[arg-type]

    def asker(self) -> None:
        self.turns.point()
        self.asked = True

    def loop(self, rank: int) -> None:
        stop = self.stops[rank]
        self.ends[rank] = self.train(stop, rank)

    def train(self, stop: GracefulStop, rank: int) -> tuple[int, bool]:
        for batch in range(1, self.batches + 1):
            if (batch - 1) % self.accumulate:
                stop.announce(batch)
            elif stop.begins(batch):
                return batch - 1, False
            self.collective(rank, (batch, 0))
            if batch in self.validate_after and not self.validate(stop, rank, batch):
                return batch, True
        return self.batches, False

    def validate(self, stop: GracefulStop, rank: int, batch: int) -> bool:
        for inner in range(1, self.validation[rank] + 1):
            if stop.begins(batch, inner):
                return False
        if stop.begins(batch, LAST):
            return False
        self.collective(rank, (batch, LAST))
        return True


def play(kind: type[Watched], choices: list[int], *, accumulate: int = 1, validation: list[int]) -> Gang:
    turns = Turns(choices)
    gang = Gang(
        turns, len(validation), 4 * accumulate, accumulate, {accumulate, 3 * accumulate}, validation, kind
    )
    for rank in range(gang.world):
        turns.add(f"loop {rank}", lambda rank=rank: gang.loop(rank))
        turns.add(f"watcher {rank}", lambda rank=rank: gang.watcher(rank))
    turns.add("asker", gang.asker)
    turns.run()
    return gang


SCHEDULES = st.lists(st.integers(0, 6), max_size=160)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    choices=SCHEDULES,
    accumulate=st.sampled_from([1, 2]),
    validation=st.lists(st.integers(1, 3), min_size=2, max_size=3),
)
@example(choices=[], accumulate=1, validation=[1, 2])
def test_all_ranks_stop_at_the_same_place(choices: list[int], accumulate: int, validation: list[int]) -> None:
    gang = play(Watched, choices, accumulate=accumulate, validation=validation)
    assert len(set(gang.ends.values())) == 1, gang.ends
    batch, _ = gang.ends[0]
    assert batch % accumulate == 0
    stopped = {stop.acted for stop in gang.stops}
    assert len(stopped) == 1
    if stopped == {True}:
        # Not a batch more than somebody had begun, but for the rest of the optimizer's step.
        assert batch * INNER <= gang.target + (accumulate - 1) * INNER  # type: ignore[operator]


def test_the_model_finds_the_fault_of_a_loop_that_looks_before_it_announces() -> None:
    faults = 0

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(choices=SCHEDULES)
    def search(choices: list[int]) -> None:
        nonlocal faults
        try:
            gang = play(Careless, choices, validation=[1, 1])
        except Stuck:
            faults += 1
        else:
            faults += len(set(gang.ends.values())) != 1

    search()
    assert faults


def test_alone_it_stops_before_the_next_thing() -> None:
    stop = GracefulStop()
    assert not stop.begins(1)
    stop.arm("SIGTERM to rank 0")
    assert stop.begins(2)
    assert stop.acted
    assert stop.batch == 1


def test_silent_rank_is_not_waited_for_without_bound() -> None:
    from trainyard.failure import PeerFailed, StopFailed

    stop = GracefulStop(2, patience=0.01)
    stop.arm("SIGTERM to rank 1")
    with pytest.raises(StopFailed, match="SIGTERM to rank 1, but not all of 2 ranks"):
        stop.begins(1)
    stop.fail("rank 1 failed: ValueError: no")
    with pytest.raises(PeerFailed, match="rank 1 failed"):
        stop.begins(1)
