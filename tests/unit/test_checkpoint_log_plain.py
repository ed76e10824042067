"""The commit log on a server without conditional writes: all interleavings of its writers, and their deaths.

The store is in memory, because every order of requests has to be made to happen; that the same code does the same on a real
server is in tests/trainer/test_checkpoint_store_faults.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.errors import NotFound, StoreUnavailable
from trainyard.checkpoint.stores import Leftover, Listed
from trainyard_api.checkpoints import Fenced, Record, Shard, commits_newest_first, order, shard_key

_SECONDS = 30.0


class Killed(BaseException):
    """The process ends here: no handler of an ordinary error may see it."""


class Memory:
    """An unconditional, consistent store. `step` is called before each request that others can tell from its absence."""

    uri = "memory://run-1"
    conditional = False

    def __init__(self, objects: dict[str, bytes], step: Callable[[str], bool] = lambda _: False) -> None:
        self.objects = objects
        self._step = step

    def get(self, key: str, limit: int = 0) -> bytes:
        if key not in self.objects:
            raise NotFound(key)
        return self.objects[key]

    def put(self, key: str, data: bytes) -> None:
        lost = self._step("put")
        self.objects[key] = data
        if lost:
            raise StoreUnavailable("the answer was lost")

    def list(self, prefix: str) -> list[str]:
        self._step("list")
        return sorted(key for key in self.objects if key.startswith(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            lost = self._step("delete")
            self.objects.pop(key, None)
            if lost:
                raise StoreUnavailable("the answer was lost")

    # Not used by what is tested here.
    def read(self, key: str) -> Iterator[bytes]:
        raise NotImplementedError

    def read_into(self, key: str, begin: int, buffer: memoryview) -> None:
        raise NotImplementedError

    def put_parts(self, key: str, path: object, part: int) -> list[str]:  # type: ignore[valid-type]
        raise NotImplementedError

    def create(self, key: str, data: bytes) -> bool:
        raise AssertionError("a conditional write on a server that has none")

    def listing(self, prefix: str) -> Sequence[Listed]:
        raise NotImplementedError

    def leftovers(self, prefix: str = "") -> Sequence[Leftover]:
        return []

    def abort(self, leftover: Leftover) -> None:
        raise NotImplementedError


@dataclass
class Process:
    """A writer in a thread, which does one request whenever it is told to."""

    name: str
    main: Callable[[CommitLog, Process], None]
    dies_before: int = -1
    """The number of the request at which it is killed; -1: never."""
    loses: int = -1
    """The number of the request whose answer is lost."""
    requests: int = 0
    done: bool = False
    acknowledged: list[Record] = field(default_factory=list)
    known: set[tuple[int, int]] = field(default_factory=set)
    """What a fence that holds went on from."""
    error: BaseException | None = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    paused: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self, objects: dict[str, bytes]) -> threading.Thread:
        log = CommitLog(Memory(objects, self._step), "run-1")

        def run() -> None:
            try:
                self.main(log, self)
            except (Killed, Fenced):
                pass
            except BaseException as error:
                self.error = error
            self.done = True
            self.paused.release()

        thread = threading.Thread(target=run, name=self.name, daemon=True)
        thread.start()
        assert self.paused.acquire(timeout=_SECONDS)
        return thread

    def turn(self) -> None:
        self.go.release()
        assert self.paused.acquire(timeout=_SECONDS)

    def _step(self, _what: str) -> bool:
        self.paused.release()
        assert self.go.acquire(timeout=_SECONDS)
        self.requests += 1
        if self.requests - 1 == self.dies_before:
            raise Killed
        return self.requests - 1 == self.loses


def every_order(
    world: Callable[[], tuple[dict[str, bytes], list[Process]]],
) -> Iterator[tuple[dict[str, bytes], list[Process]]]:
    """Runs the processes of `world` in all orders of their requests; yields each outcome."""
    schedule: list[int] = []
    while True:
        objects, processes = world()
        threads = [process.start(objects) for process in processes]
        choices: list[tuple[int, int]] = []
        while ready := [p for p in processes if not p.done]:
            at = len(choices)
            chosen = schedule[at] if at < len(schedule) else 0
            choices.append((chosen, len(ready)))
            ready[chosen].turn()
        for thread in threads:
            thread.join(_SECONDS)
        for process in processes:
            if process.error is not None:
                raise process.error
        yield objects, processes
        while choices and choices[-1][0] + 1 == choices[-1][1]:
            choices.pop()
        if not choices:
            return
        schedule = [chosen for chosen, _ in choices[:-1]] + [choices[-1][0] + 1]


def commit(step: int, attempt: int = 1) -> Record:
    shard = Shard(key=shard_key(step, attempt, 0, 1), rank=0, size=1, sha256="0" * 64)
    return Record(
        kind="commit", seq=0, run="run-1", attempt=attempt, step=step, time=0.0, world_size=1, shards=[shard]
    )


def fence(attempt: int, time: float = 0.0) -> Record:
    return Record(kind="fence", seq=0, run="run-1", attempt=attempt, step=0, time=time)


def again(call: Callable[[], Record | None]) -> Record | None:
    """As `with_retries`, without its pauses."""
    while True:
        try:
            return call()
        except StoreUnavailable:
            continue


def saves(*steps: int) -> Callable[[CommitLog, Process], None]:
    def main(log: CommitLog, me: Process) -> None:
        for step in steps:
            made = again(lambda: log.append(commit(step)))  # noqa: B023
            assert made is not None
            me.acknowledged.append(made)

    return main


def resumes(
    attempt: int, then: int | None = None, time: float = 0.0, tries: int = 4
) -> Callable[[CommitLog, Process], None]:
    """Begins an attempt as resume.py does: read, then fence, and start over if anything was new."""

    def main(log: CommitLog, me: Process) -> None:
        for _ in range(tries):
            known = {order(r) for r in log.refresh()}
            made = again(lambda: log.try_append(fence(attempt, time)))
            if made is not None:
                me.known = known
                me.acknowledged.append(made)
                break
        else:
            return
        if then is not None:
            saved = again(lambda: log.append(commit(then, attempt)))
            assert saved is not None
            me.acknowledged.append(saved)

    return main


def begun() -> dict[str, bytes]:
    objects: dict[str, bytes] = {}
    assert CommitLog(Memory(objects), "run-1").append(fence(1)).seq == 1
    return objects


def check(objects: dict[str, bytes], old: Process, new: Process) -> None:
    log = CommitLog(Memory(objects), "run-1")
    left = {order(r) for r in log.refresh()}
    commits = [r for r in old.acknowledged if r.kind == "commit"]
    for record in [*commits, *new.acknowledged]:
        assert order(record) in left, "an acknowledged record is lost"
    if new.acknowledged:
        for record in commits:
            assert order(record) in new.known, "the old attempt's commit was acknowledged past the fence"
        if len(new.acknowledged) > 1:
            assert commits_newest_first(log.records)[0] == new.acknowledged[1]


@pytest.mark.parametrize("dies_before", [-1, 0, 1, 2, 3, 4, 5, 6])
def test_a_writer_and_a_fence_in_every_order(dies_before: int) -> None:
    def world() -> tuple[dict[str, bytes], list[Process]]:
        return begun(), [Process("old", saves(10, 20), dies_before), Process("new", resumes(2))]

    outcomes = set()
    for objects, (old, new) in every_order(world):
        check(objects, old, new)
        assert new.acknowledged, "with one other writer the fence is written in the end"
        outcomes.add(len(old.acknowledged))
    assert outcomes == {-1: {0, 1, 2}, 4: {0, 1}, 5: {0, 1}, 6: {0, 1, 2}}.get(
        dies_before, {0} if dies_before < 3 else {0, 1}
    )


@pytest.mark.parametrize("dies_before", [0, 1, 2, 3, 4, 5])
def test_a_fence_whose_writer_dies_loses_nothing(dies_before: int) -> None:
    def world() -> tuple[dict[str, bytes], list[Process]]:
        return begun(), [Process("old", saves(10)), Process("new", resumes(2), dies_before)]

    for objects, (old, new) in every_order(world):
        check(objects, old, new)
        third = CommitLog(Memory(objects), "run-1")
        known = {order(r) for r in third.refresh()}
        assert third.try_append(fence(3)) is not None
        assert all(order(r) in known for r in old.acknowledged)


@pytest.mark.parametrize(("of", "loses"), [(of, loses) for of in ("old", "new") for loses in range(1, 4)])
def test_a_lost_answer_changes_nothing(of: str, loses: int) -> None:
    def world() -> tuple[dict[str, bytes], list[Process]]:
        old, new = (
            Process("old", saves(10)),
            Process("new", resumes(2, then=30 if loses < 3 else None, tries=3 if loses < 3 else 2)),
        )
        (old if of == "old" else new).loses = loses
        return begun(), [old, new]

    for objects, (old, new) in every_order(world):
        check(objects, old, new)
        steps = [r.step for r in CommitLog(Memory(objects), "run-1").refresh() if r.kind == "commit"]
        assert len(steps) == len(set(steps)), "a commit was written twice"


def test_two_that_take_the_same_attempt_are_never_both_let_through() -> None:
    """Two laptops with one folder: each takes one more than the newest attempt it sees."""

    def world() -> tuple[dict[str, bytes], list[Process]]:
        return begun(), [
            Process("one", resumes(2, time=1.0, tries=1)),
            Process("two", resumes(2, time=2.0, tries=2)),
        ]

    winners = set()
    for objects, (one, two) in every_order(world):
        left = [r for r in CommitLog(Memory(objects), "run-1").refresh() if r.attempt == 2]
        if one.acknowledged and two.acknowledged:
            # The later one saw the earlier's fence before it chose its number; a caller would take attempt 3.
            first, second = sorted([one, two], key=lambda p: p.acknowledged[0].seq)
            assert order(first.acknowledged[0]) in second.known
        winners.add((bool(one.acknowledged), bool(two.acknowledged)))
        assert {order(r) for p in (one, two) for r in p.acknowledged} <= {order(r) for r in left}
    assert (True, True) in winners
