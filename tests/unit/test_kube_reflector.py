"""The reflector mirrors the server through every way a watch can end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.fakes.api import FakeApi
from tests.fakes.api_contract import a_lease
from tests.fakes.clock import FakeClock, settle
from trainyard_operator.kube.api import LEASES, ApiError, Object, WatchEvent
from trainyard_operator.kube.reflector import MAX_BACKOFF, Reflector
from trainyard_operator.kube.store import Key, Store


class World:
    def __init__(self) -> None:
        self.api, self.clock, self.store = FakeApi(), FakeClock(), Store()
        self.gone: list[str] = []
        self.reflector = Reflector(
            self.api, LEASES, "ns", "", self.store, self.heard, clock=self.clock, rng=random.Random(1)
        )

    def heard(self, key: Key, old: Object | None, new: Object | None) -> None:
        if new is None:
            self.gone.append(key[1])

    def names(self) -> list[str]:
        return sorted(o["metadata"]["name"] for o in self.store)

    def put(self, name: str) -> None:
        self.api.seed(LEASES, {"metadata": {"name": name, "namespace": "ns"}})

    def drop(self, name: str) -> None:
        self.api.finish_deletion(LEASES, "ns", name)

    @property
    def restarts(self) -> dict[str, int]:
        return dict(self.reflector.restarts)


@asynccontextmanager
async def reflecting(world: World) -> AsyncIterator[World]:
    task = asyncio.create_task(world.reflector.run())
    await settle()
    try:
        yield world
        assert not task.done(), "a reflector never ends by itself"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert world.api.watching == 0


async def test_it_lists_then_follows() -> None:
    world = World()
    world.put("a")
    assert not world.reflector.synced.is_set()
    async with reflecting(world):
        assert world.reflector.synced.is_set() and world.names() == ["a"]
        world.put("b")
        world.drop("a")
        await settle()
        assert world.names() == ["b"] and world.gone == ["a"]
        assert world.api.verbs() == ["list", "watch"]


async def test_a_watch_that_ends_well_goes_on_from_the_last_bookmark_at_once() -> None:
    world = World()
    async with reflecting(world):
        world.put("a")
        world.api.bookmark()
        await settle()
        world.api.compact()
        world.api.close_watches()
        await settle()
        world.put("b")
        await settle()
        assert world.names() == ["a", "b"] and world.api.verbs() == ["list", "watch", "watch"]
        assert world.restarts == {"closed": 1}


@pytest.mark.parametrize("told", ["as status", "in the stream"])
async def test_gone_lists_anew_and_reports_what_vanished_meanwhile(told: str) -> None:
    world = World()
    world.put("a")
    world.put("b")
    async with reflecting(world):
        gone = ApiError(410, "Expired", "too old")
        if told == "as status":
            world.api.fail_next("watch", gone)
            world.api.close_watches(ApiError(0, "ConnectionFailed", "cut"))
        else:
            world.api.close_watches(gone)
        await settle()
        world.drop("a")
        world.put("c")
        await world.clock.advance(1)
        assert world.names() == ["b", "c"] and world.gone == ["a"]
        assert world.restarts["expired"] == 1 and world.api.verbs().count("list") == 2


async def test_errors_back_off_with_a_cap_and_heal() -> None:
    world = World()
    async with reflecting(world):
        world.api.fail_next("watch", ApiError(500, "InternalError", "no"), times=20)
        world.api.fail_next("list", ApiError(503, "ServiceUnavailable", "no"), times=20)
        world.api.close_watches(ApiError(0, "ConnectionFailed", "cut"))
        await world.clock.advance(0.05)
        assert sum(world.restarts.values()) == 1, "not at once"
        await world.clock.advance(3600)
        tries = sum(world.restarts.values())
        assert tries == 41 and world.reflector.restarts["error-503"] == 20
        world.put("a")
        await world.clock.advance(MAX_BACKOFF)
        assert world.names() == ["a"]
        # and the next failure starts with a short delay again
        world.api.close_watches(ApiError(0, "ConnectionFailed", "cut"))
        await world.clock.advance(0.3)
        world.put("b")
        await settle()
        assert world.names() == ["a", "b"]


async def test_silence_is_followed_by_a_new_watch_without_a_list() -> None:
    world = World()
    async with reflecting(world):
        world.api.close_watches(ApiError(0, "Inactive", "70 s"))
        world.put("a")
        await world.clock.advance(1)
        assert world.names() == ["a"] and world.restarts == {"inactive": 1}
        assert world.api.verbs() == ["list", "watch", "watch"]


async def test_a_server_that_closes_at_once_is_not_hammered() -> None:
    world = World()
    async with reflecting(world):
        for _ in range(50):
            world.api.close_watches()
            await settle()
        assert sum(world.restarts.values()) == 1 and world.restarts == {"short": 1}


async def test_retry_after_is_kept() -> None:
    world = World()
    async with reflecting(world):
        world.api.close_watches(ApiError(429, "TooManyRequests", "busy", retry_after=9))
        await world.clock.advance(8.9)
        assert world.api.watching == 0
        await world.clock.advance(0.2)
        assert world.api.watching == 1


async def test_a_version_that_the_server_does_not_like_is_doubted_in_the_end() -> None:
    world = World()
    async with reflecting(world):
        world.api.fail_next("watch", ApiError(504, "Timeout", "Too large resource version"), times=3)
        world.api.close_watches(ApiError(0, "ConnectionFailed", "cut"))
        await world.clock.advance(60)
        assert world.api.verbs().count("list") == 2 and world.api.watching == 1


async def test_a_restored_backup_is_believed() -> None:
    world = World()
    world.put("a")
    async with reflecting(world):
        world.put("b")
        await settle()
        world.api.objects[LEASES].clear()
        world.api._version = 50  # etcd as it was long ago
        world.api._history.clear()
        world.api.close_watches(ApiError(410, "Expired", "x"))
        await settle()
        world.put("z")
        await world.clock.advance(1)
        assert world.names() == ["z"] and sorted(world.gone) == ["a", "b"]


async def test_a_bug_in_reading_is_logged_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(FakeApi):
        async def watch(self, *args: object, **more: object) -> AsyncIterator[WatchEvent]:
            if self.verbs().count("list") == 1:
                yield WatchEvent("ADDED", {"metadata": {}})
            async for event in super().watch(*args, **more):  # type: ignore[arg-type]
                yield event

    world = World()
    world.api = world.reflector._api = Odd()
    async with reflecting(world):
        world.put("a")
        await world.clock.advance(1)
        assert world.names() == ["a"] and world.restarts == {"exception": 1}
    assert "in a way that it should not" in caplog.text


async def test_freshness_is_when_the_server_last_spoke() -> None:
    world = World()
    async with reflecting(world):
        start = world.clock.now
        await world.clock.advance(100)
        assert world.reflector.last_event_monotonic == start
        world.api.bookmark()
        await settle()
        assert world.reflector.last_event_monotonic == start + 100


async def test_a_selector_limits_what_is_seen() -> None:
    world = World()
    world.reflector = Reflector(world.api, LEASES, None, "app=a", world.store, clock=world.clock)
    await world.api.create(LEASES, "x", a_lease("one", app="a"))
    await world.api.create(LEASES, "x", a_lease("two", app="b"))
    async with reflecting(world):
        assert world.names() == ["one"]
        for label, names in (("b", []), ("a", ["one"])):
            await world.api.merge_patch(LEASES, "x", "one", {"metadata": {"labels": {"app": label}}})
            await settle()
            assert world.names() == names
