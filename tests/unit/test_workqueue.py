"""The work queue: one worker a key, nothing lost, nothing too early."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.clock import FakeClock, settle
from trainyard_operator.workqueue import MAX_DELAY, WorkQueue

Handler = Callable[[str], Awaitable[float | None]]


@asynccontextmanager
async def running(queue: WorkQueue[str], handler: Handler, workers: int = 2) -> AsyncIterator[None]:
    task = asyncio.create_task(queue.run(workers, handler))
    await settle()
    try:
        yield
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Gate:
    """A handler that notes who runs, and ends when told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.open: dict[str, asyncio.Future[float | None]] = {}

    async def __call__(self, key: str) -> float | None:
        assert key not in self.open, f"two workers on {key}"
        self.started.append(key)
        self.open[key] = asyncio.get_running_loop().create_future()
        try:
            return await self.open[key]
        finally:
            del self.open[key]

    async def finish(self, key: str, again: float | None = None) -> None:
        self.open[key].set_result(again)
        await settle()

    async def fail(self, key: str, error: Exception) -> None:
        self.open[key].set_exception(error)
        await settle()


async def test_many_adds_are_one_round_and_adds_in_flight_one_more() -> None:
    gate, queue = Gate(), WorkQueue[str](clock=FakeClock())
    async with running(queue, gate):
        for _ in range(5):
            queue.add("a")
        await settle()
        assert gate.started == ["a"] and queue.in_flight() == {"a"}
        for _ in range(5):
            queue.add("a")
        await settle()
        assert gate.started == ["a"], "the second worker must not take it"
        await gate.finish("a")
        assert gate.started == ["a", "a"]
        await gate.finish("a")
        assert gate.started == ["a", "a"] and not queue.in_flight() and len(queue) == 0


async def test_the_earliest_delay_wins_and_an_add_overrides_it() -> None:
    clock, gate = FakeClock(), Gate()
    queue = WorkQueue[str](clock=clock)
    async with running(queue, gate):
        for seconds in (30, 10, 20):
            queue.add_after("a", seconds)
        await clock.advance(9.9)
        assert gate.started == []
        await clock.advance(0.1)
        assert gate.started == ["a"]
        await gate.finish("a")
        await clock.advance(60)
        assert gate.started == ["a"], "the later ones are void"
        queue.add_after("a", 10)
        queue.add("a")
        await settle()
        await gate.finish("a")
        await clock.advance(60)
        assert gate.started == ["a", "a"]


async def test_what_a_handler_asks_for_is_void_if_the_key_was_added_meanwhile() -> None:
    clock, gate = FakeClock(), Gate()
    queue = WorkQueue[str](clock=clock)
    async with running(queue, gate):
        queue.add("a")
        await settle()
        queue.add("a")
        await gate.finish("a", 5.0)
        assert gate.started == ["a", "a"]
        await gate.finish("a", None)
        await clock.advance(60)
        assert gate.started == ["a", "a"]
        queue.add("a")
        await settle()
        await gate.finish("a", 5.0)
        await clock.advance(4.9)
        assert len(gate.started) == 3
        await clock.advance(0.1)
        assert len(gate.started) == 4


async def test_failures_back_off_up_to_the_cap_and_success_forgets_them() -> None:
    clock, gate = FakeClock(), Gate()
    queue = WorkQueue[str](clock=clock, rng=random.Random(1))
    async with running(queue, gate):
        queue.add("a")
        await settle()
        for failure in range(16):
            nominal = min(MAX_DELAY, 0.05 * 2**failure)
            await gate.fail("a", RuntimeError("no"))
            assert queue.failures("a") == failure + 1
            await clock.advance(nominal * 0.79)
            assert len(gate.started) == failure + 1, "too early"
            await clock.advance(nominal * 0.22)
            assert len(gate.started) == failure + 2, "too late"
        await gate.finish("a")
        assert queue.failures("a") == 0


async def test_an_error_may_ask_for_more_time() -> None:
    class Busy(Exception):
        retry_after = 7.0

    clock, gate = FakeClock(), Gate()
    queue = WorkQueue[str](clock=clock)
    async with running(queue, gate):
        queue.add("a")
        await settle()
        await gate.fail("a", Busy())
        await clock.advance(6.9)
        assert len(gate.started) == 1
        await clock.advance(0.2)
        assert len(gate.started) == 2


async def test_a_slow_key_holds_up_no_other() -> None:
    clock, gate = FakeClock(), Gate()
    queue = WorkQueue[str](clock=clock)
    async with running(queue, gate):
        queue.add("slow")
        await settle()
        for key in ("a", "b", "c"):
            queue.add(key)
            await settle()
            await gate.finish(key)
        assert gate.started == ["slow", "a", "b", "c"]
        await clock.advance(90)
        assert queue.longest_running() == 90


class Seen:
    def __init__(self) -> None:
        self.depths: list[int] = []
        self.adds = self.retries = 0
        self.waits: list[float] = []
        self.works: list[float] = []

    def depth(self, count: int) -> None:
        self.depths.append(count)

    def added(self) -> None:
        self.adds += 1

    def retried(self) -> None:
        self.retries += 1

    def queued(self, seconds: float) -> None:
        self.waits.append(seconds)

    def worked(self, seconds: float) -> None:
        self.works.append(seconds)


async def test_metrics_tell_waiting_and_working_apart() -> None:
    clock, gate, seen = FakeClock(), Gate(), Seen()
    queue = WorkQueue[str](clock=clock, metrics=seen)
    async with running(queue, gate, workers=1):
        queue.add("a")
        queue.add("b")
        await clock.advance(3)
        await gate.finish("a")
        await clock.advance(4)
        await gate.fail("b", RuntimeError("no"))
    assert seen.waits == [0, 3] and seen.works == [3, 4]
    assert (seen.adds, seen.retries) == (2, 1)
    assert max(seen.depths) == 2 and seen.depths[-1] == 0


async def test_cancelling_ends_all_workers() -> None:
    gate, queue = Gate(), WorkQueue[str]()
    before = len(asyncio.all_tasks())
    async with running(queue, gate, workers=3):
        queue.add("a")
        await settle()
    assert len(asyncio.all_tasks()) == before and not gate.open


KEYS = st.sampled_from("abc")
STEPS = st.one_of(
    st.tuples(st.just("add"), KEYS),
    st.tuples(st.just("after"), KEYS, st.sampled_from([1.0, 2.0, 5.0])),
    st.tuples(st.just("advance"), st.sampled_from([0.5, 1.0, 3.0])),
    st.tuples(st.just("finish"), KEYS, st.sampled_from([None, 0.0, 2.0])),
    st.tuples(st.just("fail"), KEYS),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=25), st.integers(1, 3))
def test_no_add_is_ever_lost(steps: list[tuple[object, ...]], workers: int) -> None:
    """Whatever happens: never two workers on a key (Gate asserts it), each add is followed by a later start,
    starts are no more than what asked for them, and the queue comes to rest when nobody asks any more."""
    asyncio.run(_play(steps, workers))


async def _play(steps: list[tuple[object, ...]], workers: int) -> None:
    clock, gate = FakeClock(), Gate()
    queue = WorkQueue[str](clock=clock)
    asked: dict[str, int] = dict.fromkeys("abc", 0)
    unseen: dict[str, int] = {}  # key -> starts there were when it was added
    async with running(queue, gate, workers):
        for step in steps:
            match step:
                case ("add", str(key)):
                    asked[key] += 1
                    unseen.setdefault(key, gate.started.count(key))
                    queue.add(key)
                case ("after", str(key), float(seconds)):
                    asked[key] += 1
                    unseen.setdefault(key, gate.started.count(key))
                    queue.add_after(key, seconds)
                case ("advance", float(seconds)):
                    await clock.advance(seconds)
                case ("finish", str(key), again) if key in gate.open:
                    asked[key] += again is not None
                    await gate.finish(key, again)  # type: ignore[arg-type]
                case ("fail", str(key)) if key in gate.open:
                    asked[key] += 1
                    await gate.fail(key, RuntimeError("no"))
            await settle()
            for key, starts in list(unseen.items()):
                if gate.started.count(key) > starts:
                    del unseen[key]
        for _ in range(100):
            for key in list(gate.open):
                await gate.finish(key)
            await clock.advance(400)
            if not gate.open and not len(queue):
                break
        else:
            pytest.fail("the queue did not come to rest")
        for key, starts in unseen.items():
            assert gate.started.count(key) > starts, f"an add of {key} was lost"
        for key, count in asked.items():
            assert gate.started.count(key) <= count, f"{key} was handled more often than asked"
