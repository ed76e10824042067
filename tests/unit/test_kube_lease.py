"""Leader election: at most one leads, by each candidate's own clock."""

from __future__ import annotations

import asyncio
import datetime
import random
import re
from typing import Any

import pytest

from tests.fakes.api import FakeApi
from tests.fakes.clock import FakeClock, settle
from trainyard_operator.kube.api import LEASES, ApiError, Object
from trainyard_operator.kube.lease import LeaderElector, Timing

DOWN = ApiError(0, "ConnectionFailed", "down")


class Candidate:
    def __init__(self, api: Any, clock: FakeClock, identity: str) -> None:
        self.lost: list[str] = []
        self.elector = LeaderElector(
            api, "ns", "op", identity, self.lost.append, clock=clock, rng=random.Random(identity)
        )
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> Candidate:
        self.task = asyncio.create_task(self.elector.run())
        await settle()
        return self

    async def stop(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    @property
    def leads(self) -> bool:
        return self.elector.is_leading()


class Cut(FakeApi):
    """An API server that some candidates cannot reach."""

    def __init__(self, shared: FakeApi) -> None:
        super().__init__()
        self.shared, self.cut = shared, False

    async def get(self, *args: Any) -> Object:
        self.check()
        return await self.shared.get(*args)

    async def create(self, *args: Any) -> Object:
        self.check()
        return await self.shared.create(*args)

    async def replace(self, *args: Any) -> Object:
        self.check()
        return await self.shared.replace(*args)

    def check(self) -> None:
        if self.cut:
            raise DOWN


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def spec(api: FakeApi) -> dict[str, Any]:
    found = api.peek(LEASES, "ns", "op")
    assert found is not None
    return dict(found["spec"])


async def test_the_record_is_what_kubernetes_expects(api: FakeApi, clock: FakeClock) -> None:
    one = await Candidate(api, clock, "one").start()
    assert one.leads and one.elector.leading.is_set()
    first = spec(api)
    assert first["holderIdentity"] == "one" and first["leaseTransitions"] == 0
    assert first["leaseDurationSeconds"] == 15
    for field in ("acquireTime", "renewTime"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first[field])
        assert datetime.datetime.fromisoformat(first[field]).timestamp() == pytest.approx(clock.now)
    await clock.advance(20)
    later = spec(api)
    assert later["renewTime"] > first["renewTime"] and later["acquireTime"] == first["acquireTime"]
    assert "get" not in api.verbs()[2:], "renewing is one request"
    await one.stop()


async def test_a_release_lets_the_next_one_in_within_a_retry(api: FakeApi, clock: FakeClock) -> None:
    one = await Candidate(api, clock, "one").start()
    two = await Candidate(api, clock, "two").start()
    await clock.advance(60)
    assert one.leads and not two.leads and two.elector.holder == "one"
    await one.stop()
    assert spec(api)["holderIdentity"] == "" and not one.leads and one.lost == []
    await clock.advance(2.5)
    assert two.leads and spec(api)["holderIdentity"] == "two" and spec(api)["leaseTransitions"] == 1
    await two.stop()


async def test_a_leader_that_is_cut_off_ends_before_another_begins(api: FakeApi, clock: FakeClock) -> None:
    cut = Cut(api)
    one = await Candidate(cut, clock, "one").start()
    two = await Candidate(api, clock, "two").start()
    await clock.advance(20)
    cut.cut = True
    ended = began = 0.0
    for _ in range(300):
        await clock.advance(0.1)
        assert not (one.leads and two.leads)
        ended = ended or (clock.now if one.lost else 0.0)
        began = began or (clock.now if two.leads else 0.0)
    assert 0 < ended < began and began - ended >= 15 - 10 - 0.2
    assert "not renewed for 10 s" in one.lost[0] and "down" in one.lost[0]
    assert one.task is not None and one.task.done()
    await two.stop()


async def test_a_short_outage_costs_nothing(api: FakeApi, clock: FakeClock) -> None:
    cut = Cut(api)
    one = await Candidate(cut, clock, "one").start()
    cut.cut = True
    await clock.advance(9)
    cut.cut = False
    await clock.advance(30)
    assert one.leads and one.lost == []
    await one.stop()


async def test_a_renewal_whose_answer_is_lost_is_still_ours(api: FakeApi, clock: FakeClock) -> None:
    one = await Candidate(api, clock, "one").start()
    api.fail_next("replace", DOWN, after=True)
    await clock.advance(30)
    assert one.leads and one.lost == [] and spec(api)["leaseTransitions"] == 0
    await one.stop()


async def test_an_acquisition_whose_answer_is_lost_is_still_ours(api: FakeApi, clock: FakeClock) -> None:
    api.fail_next("create", DOWN, after=True)
    one = await Candidate(api, clock, "one").start()
    assert not one.leads
    await clock.advance(3)
    assert one.leads
    await one.stop()


async def test_clocks_of_others_do_not_matter(api: FakeApi, clock: FakeClock) -> None:
    """A holder whose renewTime is years off keeps the lease as long as its record changes."""
    times = ("1999-01-01T00:00:00.000000Z", "2099-01-01T00:00:00.000000Z")
    body = {"holderIdentity": "strange", "leaseDurationSeconds": 15}
    api.seed(LEASES, {"metadata": {"name": "op", "namespace": "ns"}, "spec": body})
    two = await Candidate(api, clock, "two").start()
    for number in range(8):
        await api.merge_patch(LEASES, "ns", "op", {"spec": {"renewTime": times[number % 2]}})
        await clock.advance(10)
        assert not two.leads
    await clock.advance(8)
    assert two.leads
    await two.stop()


async def test_two_that_try_at_once_get_one_leader(api: FakeApi, clock: FakeClock) -> None:
    for existing in (False, True):
        candidates = [Candidate(api, clock, f"{existing}-{n}") for n in range(5)]
        await asyncio.gather(*(c.start() for c in candidates))
        await clock.advance(5)
        assert sum(c.leads for c in candidates) == 1
        for candidate in candidates:
            await candidate.stop()


@pytest.mark.parametrize("how", ["taken", "emptied", "deleted"])
async def test_a_record_that_is_ours_no_more_ends_us_at_once(
    how: str, api: FakeApi, clock: FakeClock
) -> None:
    one = await Candidate(api, clock, "one").start()
    if how == "deleted":
        await api.delete(LEASES, "ns", "op")
    else:
        holder = "other" if how == "taken" else ""
        await api.merge_patch(LEASES, "ns", "op", {"spec": {"holderIdentity": holder}})
    await clock.advance(4.1)
    assert len(one.lost) == 1 and not one.leads
    if how == "taken":
        assert spec(api)["holderIdentity"] == "other"


async def test_a_process_that_slept_knows_before_it_writes(api: FakeApi, clock: FakeClock) -> None:
    one = await Candidate(api, clock, "one").start()
    clock.now += 11  # stopped: no task ran meanwhile
    assert not one.leads and one.elector.leading.is_set()
    await clock.advance(0.1)
    assert one.lost and spec(api)["holderIdentity"] == "one"


async def test_what_cannot_be_released_is_left(api: FakeApi, clock: FakeClock) -> None:
    cut = Cut(api)
    one = await Candidate(cut, clock, "one").start()
    cut.cut = True
    await one.stop()
    assert spec(api)["holderIdentity"] == "one" and one.lost == []


async def test_a_standby_ends_quietly(api: FakeApi, clock: FakeClock) -> None:
    one = await Candidate(api, clock, "one").start()
    two = await Candidate(api, clock, "two").start()
    before = spec(api)
    await two.stop()
    assert spec(api) == before and two.lost == []
    await one.stop()


@pytest.mark.parametrize("timing", [(10, 10, 2), (15, 2, 2), (15, 10, 0)])
def test_timing_that_cannot_be_safe_is_refused(timing: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must hold"):
        Timing(*timing)
