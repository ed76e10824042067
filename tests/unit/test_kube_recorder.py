"""Events: posted once, counted when repeated, never in anybody's way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.api import FakeApi
from tests.fakes.clock import FakeClock, settle
from trainyard_operator.kube import recorder as module
from trainyard_operator.kube.api import EVENTS, ApiError, Object
from trainyard_operator.kube.recorder import MAX_NOTE, Recorder, Regarding, clean

RUN = Regarding("trainyard.dev/v1alpha1", "TrainingRun", "ns", "run", "uid-1")


@asynccontextmanager
async def recording(
    api: FakeApi | None = None, **options: Any
) -> AsyncIterator[tuple[FakeApi, FakeClock, Recorder]]:
    api, clock = api or FakeApi(), FakeClock()
    recorder = Recorder(api, "pod-1", clock=clock, **options)
    task = asyncio.create_task(recorder.run())
    try:
        yield api, clock, recorder
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_event_is_complete() -> None:
    async with recording() as (api, _, recorder):
        recorder.event(RUN, "Restarting", "rank 1 failed", warning=True, action="Restart")
        assert await recorder.flush(5)
        (event,) = api.all(EVENTS)
        assert event["type"] == "Warning" and event["reason"] == "Restarting" and event["action"] == "Restart"
        assert event["note"] == "rank 1 failed" and event["eventTime"].endswith("Z")
        assert event["reportingController"] == "trainyard.dev/operator"
        assert event["reportingInstance"] == "pod-1"
        assert event["regarding"] == {
            "apiVersion": "trainyard.dev/v1alpha1",
            "kind": "TrainingRun",
            "namespace": "ns",
            "name": "run",
            "uid": "uid-1",
        }
        assert "series" not in event and recorder.counts == {"posted": 1}


async def test_repeats_are_counted_in_the_first_one() -> None:
    async with recording() as (api, clock, recorder):
        for _ in range(3):
            recorder.event(RUN, "R", "same")
            await clock.advance(100)
        (event,) = api.all(EVENTS)
        assert event["series"]["count"] == 3 and event["series"]["lastObservedTime"] > event["eventTime"]
        recorder.event(RUN, "R", "other note")
        recorder.event(RUN, "S", "same")
        recorder.event(Regarding("v1", "Pod", "ns", "p", "uid-2"), "R", "same")
        recorder.event(RUN, "R", "same", warning=True)
        await recorder.flush(5)
        assert len(api.all(EVENTS)) == 5


async def test_after_six_minutes_it_is_news_again() -> None:
    async with recording() as (api, clock, recorder):
        for pause in (359, 360, 0):
            recorder.event(RUN, "R", "same")
            await clock.advance(pause)
        counts = sorted(e.get("series", {}).get("count", 1) for e in api.all(EVENTS))
        assert counts == [1, 2]


async def test_many_repeats_are_one_write_when_posting_is_slow() -> None:
    api = FakeApi()
    gate, create = asyncio.Event(), api.create

    async def slow(*args: Any) -> Object:
        await gate.wait()
        return await create(*args)

    api.create = slow  # type: ignore[method-assign,assignment]
    async with recording(api) as (_, _, recorder):
        recorder.event(RUN, "R", "same")
        await settle()
        for _ in range(100):
            recorder.event(RUN, "R", "same")
        assert not await recorder.flush(0.01)
        gate.set()
        assert await recorder.flush(5)
        assert api.verbs(EVENTS) == ["create", "patch"]
        assert api.all(EVENTS)[0]["series"]["count"] == 101


async def test_a_full_queue_drops_and_counts() -> None:
    api = FakeApi()
    recorder = Recorder(api, "pod-1", max_queue=3)
    for number in range(5):
        recorder.event(RUN, "R", f"note {number}")
    for _ in range(2):
        recorder.event(RUN, "R", "note 0")
    assert recorder.counts == {"dropped": 2, "aggregated": 2}
    task = asyncio.create_task(recorder.run())
    assert await recorder.flush(5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sorted(e["note"] for e in api.all(EVENTS)) == ["note 0", "note 1", "note 2"]
    assert max(e.get("series", {}).get("count", 1) for e in api.all(EVENTS)) == 3


async def test_a_lost_answer_does_not_double_the_event() -> None:
    async with recording() as (api, clock, recorder):
        api.fail_next("create", ApiError(0, "Timeout", "lost"), after=True)
        recorder.event(RUN, "R", "note")
        await clock.advance(5)
        assert len(api.all(EVENTS)) == 1 and recorder.counts == {"posted": 1}


async def test_an_event_that_expired_is_posted_anew() -> None:
    async with recording() as (api, clock, recorder):
        recorder.event(RUN, "R", "note")
        await recorder.flush(5)
        await api.delete(EVENTS, "ns", api.all(EVENTS)[0]["metadata"]["name"])
        await clock.advance(10)
        recorder.event(RUN, "R", "note")
        await recorder.flush(5)
        (event,) = api.all(EVENTS)
        assert event["series"]["count"] == 2


@pytest.mark.parametrize(("code", "tries"), [(403, 1), (404, 1), (422, 1), (500, 3), (429, 3), (0, 3)])
async def test_what_is_refused_is_counted_and_the_rest_goes_on(code: int, tries: int) -> None:
    async with recording() as (api, clock, recorder):
        api.fail_next("create", ApiError(code, "R", "no", retry_after=600), times=tries)
        recorder.event(RUN, "R", "refused")
        recorder.event(RUN, "R", "fine")
        await clock.advance(2 * module.MAX_RETRY_SECONDS)
        assert [e["note"] for e in api.all(EVENTS)] == ["fine"]
        assert recorder.counts == {"posted": 1, "failed": 1} and len(api.calls) == tries + 1


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SERIES", 3)
    async with recording() as (api, _, recorder):
        for number in range(10):
            recorder.event(RUN, "R", f"note {number}")
        assert len(recorder._series) == 3
        await recorder.flush(5)
        assert len(api.all(EVENTS)) == 10


async def test_flush_says_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(FakeApi(), "pod-1")
    assert await recorder.flush(0.01), "nothing to post"
    recorder.event(RUN, "R", "note")
    assert not await recorder.flush(0.01)
    assert "were not posted" in caplog.text


async def test_long_names_and_cluster_scoped_objects() -> None:
    async with recording() as (api, _, recorder):
        recorder.event(Regarding("v1", "Pod", "ns", "n" * 229 + "." + "x" * 23, "u"), "R", "note")
        recorder.event(Regarding("v1", "Node", "", "node", "v"), "R", "note")
        await recorder.flush(5)
        names = [(e["metadata"]["namespace"], e["metadata"]["name"]) for e in api.all(EVENTS)]
        assert names[0][0] == "default" and len(names[1][1]) <= 253 and ".." not in names[1][1]


def test_notes_are_one_clean_line() -> None:
    assert clean("a\n\tb\x1b[31m\x00 c\u202e d\u2028e") == "a b[31m c d e"
    assert clean("\ud800x") == "x"
    assert clean("") == ""


@given(st.text(max_size=3000))
def test_notes_always_fit(note: str) -> None:
    cleaned = clean(note)
    assert len(cleaned.encode()) <= MAX_NOTE
    assert clean(cleaned) == cleaned
    if len(note.encode(errors="ignore")) <= MAX_NOTE:
        assert not cleaned.endswith("...") or "..." in note
