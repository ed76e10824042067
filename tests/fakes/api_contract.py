"""What the operator relies on in an API server, as checks that `FakeApi` and a real one both pass.

Each takes an `Api` and a fresh namespace. tests/unit/test_kube_fake.py runs them against the fake, and
tests/control_plane/test_kube_api.py against kube-apiserver: so the fake cannot drift from what it stands for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from tests.fakes.merge_patch import merge
from trainyard_operator.kube.api import LEASES, PODS, Api, ApiError, Object, Resource, WatchEvent

SECONDS = 20.0
Check = Callable[[Api, str], Awaitable[None]]


def a_lease(name: str, **labels: str) -> Object:
    return {"metadata": {"name": name, "labels": labels}, "spec": {"holderIdentity": name}}


def a_pod(name: str, **more: Any) -> Object:
    spec = {
        "containers": [{"name": "c", "image": "none.invalid/none"}],
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 30,
    }
    return merge({"metadata": {"name": name}, "spec": spec}, more)


async def refused(call: Awaitable[object]) -> tuple[int, str]:
    """(status, reason) of the error that the call ends with."""
    try:
        await call
    except ApiError as error:
        return error.status, error.reason
    raise AssertionError("the call was not refused")


async def events(
    api: Api, resource: Resource, namespace: str, version: str, count: int, selector: str = ""
) -> Sequence[WatchEvent]:
    """The first `count` events after `version`, without bookmarks."""
    found: list[WatchEvent] = []
    stream: Any = api.watch(resource, namespace, resource_version=version, label_selector=selector)
    async with asyncio.timeout(SECONDS), aclosing(stream):
        async for event in stream:
            if event.type != "BOOKMARK":
                found.append(event)
            if len(found) == count:
                break
    return found


async def check_names_are_unique(api: Api, namespace: str) -> None:
    made = await api.create(LEASES, namespace, a_lease("one"))
    assert made["metadata"]["uid"] and int(made["metadata"]["resourceVersion"]) > 0
    assert await refused(api.create(LEASES, namespace, a_lease("one"))) == (409, "AlreadyExists")
    assert await refused(api.get(LEASES, namespace, "two")) == (404, "NotFound")
    assert await refused(api.merge_patch(LEASES, namespace, "two", {})) == (404, "NotFound")
    assert await refused(api.delete(LEASES, namespace, "two")) == (404, "NotFound")
    assert (await refused(api.create(LEASES, namespace, made)))[0] == 500, "with a resourceVersion"
    elsewhere = {"metadata": {"name": "x", "namespace": "kube-system"}}
    assert (await refused(api.create(LEASES, namespace, elsewhere)))[0] == 400


async def check_patches_are_conditional(api: Api, namespace: str) -> None:
    first = await api.create(LEASES, namespace, a_lease("one", a="1", b="2"))
    version = first["metadata"]["resourceVersion"]
    body = {"metadata": {"resourceVersion": version, "labels": {"a": None, "c": "3"}}}
    second = await api.merge_patch(LEASES, namespace, "one", body)
    assert second["metadata"]["labels"] == {"b": "2", "c": "3"}
    assert int(second["metadata"]["resourceVersion"]) > int(version)
    assert await refused(api.merge_patch(LEASES, namespace, "one", body)) == (409, "Conflict")
    same = await api.merge_patch(LEASES, namespace, "one", {"metadata": {"labels": {"b": "2"}}})
    assert same["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]


async def check_replace_compares_and_swaps(api: Api, namespace: str) -> None:
    first = await api.create(LEASES, namespace, a_lease("one"))
    won = await api.replace(LEASES, namespace, "one", {**first, "spec": {"holderIdentity": "w"}})
    lost = {**first, "spec": {"holderIdentity": "l"}}
    assert await refused(api.replace(LEASES, namespace, "one", lost)) == (409, "Conflict")
    assert await api.get(LEASES, namespace, "one") == won
    assert won["spec"]["holderIdentity"] == "w"


async def check_deletes_take_a_uid(api: Api, namespace: str) -> None:
    old = await api.create(LEASES, namespace, a_lease("one"))
    await api.delete(LEASES, namespace, "one", uid=old["metadata"]["uid"])
    new = await api.create(LEASES, namespace, a_lease("one"))
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    late = api.delete(LEASES, namespace, "one", uid=old["metadata"]["uid"], propagation="Background")
    assert await refused(late) == (409, "Conflict")
    assert await api.get(LEASES, namespace, "one") == new


async def check_watches_tell_all_in_order(api: Api, namespace: str) -> None:
    start = (await api.list(LEASES, namespace))["metadata"]["resourceVersion"]
    made = await api.create(LEASES, namespace, a_lease("one"))
    changed = await api.merge_patch(LEASES, namespace, "one", {"spec": {"holderIdentity": "x"}})
    await api.delete(LEASES, namespace, "one")
    found = await events(api, LEASES, namespace, start, 3)
    assert [e.type for e in found] == ["ADDED", "MODIFIED", "DELETED"]
    assert found[0].object["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    assert found[1].object == {**found[1].object, "spec": changed["spec"]}
    versions = [int(e.object["metadata"]["resourceVersion"]) for e in found]
    assert versions == sorted(set(versions)), "a deletion is a version of its own"


async def check_selectors_decide_what_a_watch_sees(api: Api, namespace: str) -> None:
    start = (await api.list(LEASES, namespace))["metadata"]["resourceVersion"]
    await api.create(LEASES, namespace, a_lease("seen", app="a"))
    await api.create(LEASES, namespace, a_lease("unseen", app="b"))
    for label in ("b", "a"):
        await api.merge_patch(LEASES, namespace, "seen", {"metadata": {"labels": {"app": label}}})
    found = await events(api, LEASES, namespace, start, 3, "app=a")
    assert [(e.type, e.object["metadata"]["name"]) for e in found] == [
        ("ADDED", "seen"),
        ("DELETED", "seen"),
        ("ADDED", "seen"),
    ]
    for selector, names in {
        "app=a": ["seen"],
        "app!=a": ["unseen"],
        "app in (a, b)": ["seen", "unseen"],
        "app": ["seen", "unseen"],
        "!app": [],
    }.items():
        items = (await api.list(LEASES, namespace, label_selector=selector))["items"]
        assert [i["metadata"]["name"] for i in items] == names, selector


async def check_lists_are_whole(api: Api, namespace: str) -> None:
    for number in range(5):
        await api.create(LEASES, namespace, a_lease(f"l{number}"))
    found = await api.list(LEASES, namespace, limit=2)
    assert [i["metadata"]["name"] for i in found["items"]] == [f"l{n}" for n in range(5)]
    assert int(found["metadata"]["resourceVersion"]) >= max(
        int(i["metadata"]["resourceVersion"]) for i in found["items"]
    )


async def check_status_is_apart(api: Api, namespace: str) -> None:
    made = await api.create(PODS, namespace, a_pod("p", status={"phase": "Running"}))
    assert made["status"]["phase"] == "Pending"
    patch = {"metadata": {"labels": {"x": "y"}}, "status": {"phase": "Failed", "message": "m"}}
    main = await api.merge_patch(PODS, namespace, "p", patch)
    assert main["status"]["phase"] == "Pending" and main["metadata"]["labels"] == {"x": "y"}
    status = await api.merge_patch(PODS, namespace, "p", {"status": patch["status"]}, subresource="status")
    assert status["status"]["phase"] == "Failed" and status["status"]["message"] == "m"


async def check_pods_on_a_node_end_gracefully(api: Api, namespace: str) -> None:
    start = (await api.list(PODS, namespace))["metadata"]["resourceVersion"]
    await api.create(PODS, namespace, a_pod("free"))
    await api.create(PODS, namespace, a_pod("bound", spec={"nodeName": "n"}))
    await api.delete(PODS, namespace, "free")
    assert (await refused(api.get(PODS, namespace, "free")))[0] == 404
    await api.delete(PODS, namespace, "bound")
    assert "deletionTimestamp" in (await api.get(PODS, namespace, "bound"))["metadata"]
    await api.delete(PODS, namespace, "bound", grace_seconds=0)
    assert (await refused(api.get(PODS, namespace, "bound")))[0] == 404
    found = await events(api, PODS, namespace, start, 7)
    told: dict[str, list[tuple[str, int | None]]] = {"free": [], "bound": []}
    for event in found:
        meta = event.object["metadata"]
        told[meta["name"]].append((event.type, meta.get("deletionGracePeriodSeconds")))
    ended = [("MODIFIED", 0), ("DELETED", 0)]
    assert told == {
        "free": [("ADDED", None), *ended],
        "bound": [("ADDED", None), ("MODIFIED", 30), *ended],
    }, told


async def check_finalizers_hold(api: Api, namespace: str) -> None:
    body = a_lease("held")
    body["metadata"]["finalizers"] = ["trainyard.dev/test"]
    await api.create(LEASES, namespace, body)
    await api.delete(LEASES, namespace, "held")
    assert "deletionTimestamp" in (await api.get(LEASES, namespace, "held"))["metadata"]
    await api.merge_patch(LEASES, namespace, "held", {"metadata": {"finalizers": None}})
    assert (await refused(api.get(LEASES, namespace, "held")))[0] == 404


CHECKS: tuple[Check, ...] = (
    check_names_are_unique,
    check_patches_are_conditional,
    check_replace_compares_and_swaps,
    check_deletes_take_a_uid,
    check_watches_tell_all_in_order,
    check_selectors_decide_what_a_watch_sees,
    check_lists_are_whole,
    check_status_is_apart,
    check_pods_on_a_node_end_gracefully,
    check_finalizers_hold,
)
