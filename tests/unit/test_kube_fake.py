"""The fake API server keeps the rules of the real one, and fails when told to."""

from __future__ import annotations

import pytest

from tests.fakes.api import FakeApi
from tests.fakes.api_contract import CHECKS, Check, a_lease, a_pod, events, refused
from trainyard_operator.kube.api import LEASES, PODS, RUNS, TOKEN_REVIEWS, ApiError


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
async def test_contract(check: Check) -> None:
    await check(FakeApi(), "ns")


async def test_injected_failures_come_before_or_after_the_change() -> None:
    api = FakeApi()
    api.fail_next("create", ApiError(503, "ServiceUnavailable", "no"), resource=LEASES)
    assert await refused(api.create(LEASES, "ns", a_lease("a"))) == (503, "ServiceUnavailable")
    assert api.peek(LEASES, "ns", "a") is None
    api.fail_next("create", ApiError(0, "Timeout", "answer lost"), after=True)
    assert (await refused(api.create(LEASES, "ns", a_lease("a"))))[0] == 0
    assert api.peek(LEASES, "ns", "a") is not None
    assert await refused(api.create(LEASES, "ns", a_lease("a"))) == (409, "AlreadyExists")
    assert api.verbs(LEASES) == ["create"] * 3


async def test_the_garbage_collector_takes_what_nobody_owns_any_more() -> None:
    api = FakeApi(gc=True)
    owner = await api.create(RUNS, "ns", {"metadata": {"name": "r"}})
    reference = {"uid": owner["metadata"]["uid"], "controller": True}
    await api.create(PODS, "ns", a_pod("p", metadata={"ownerReferences": [reference]}))
    await api.create(PODS, "ns", a_pod("q", metadata={"ownerReferences": [reference, {"uid": "other"}]}))
    await api.delete(RUNS, "ns", "r")
    assert [p["metadata"]["name"] for p in api.all(PODS)] == ["q"]


async def test_generation_counts_specs_only() -> None:
    api = FakeApi()
    await api.create(RUNS, "ns", {"metadata": {"name": "r"}, "spec": {"n": 1}})
    await api.merge_patch(RUNS, "ns", "r", {"metadata": {"labels": {"a": "b"}}})
    changed = await api.merge_patch(RUNS, "ns", "r", {"spec": {"n": 2}})
    assert changed["metadata"]["generation"] == 2


async def test_a_compacted_watch_is_gone() -> None:
    api = FakeApi()
    await api.create(LEASES, "ns", a_lease("a"))
    api.compact()
    with pytest.raises(ApiError, match="410"):
        await events(api, LEASES, "ns", "100", 1)


async def test_reactors_answer_instead() -> None:
    api = FakeApi()
    api.reactors[TOKEN_REVIEWS] = lambda body: {**body, "status": {"authenticated": True}}
    answer = await api.create(TOKEN_REVIEWS, None, {"spec": {"token": "t"}})
    assert answer["status"]["authenticated"]
