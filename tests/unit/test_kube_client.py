"""`HttpApi` against scripted answers: requests as the API wants them, typed errors, bounds on everything."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest

from tests.fakes.scripted_api import Script, paths, scripted
from trainyard_operator.kube.api import PODS, RUNS, ApiError, WatchEvent
from trainyard_operator.kube.client import HttpApi
from trainyard_operator.kube.lines import LineTooLong, iterate


def line(kind: str, version: int = 1, **more: Any) -> bytes:
    obj = {"metadata": {"name": "p", "resourceVersion": str(version)}, **more}
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def status(code: int, reason: str, **details: Any) -> dict[str, Any]:
    return {
        "kind": "Status",
        "code": code,
        "reason": reason,
        "message": f"because {reason}",
        "details": details,
    }


async def watch(api: HttpApi) -> tuple[list[WatchEvent], ApiError | None]:
    """All events of one watch, and the error that it ended with."""
    found: list[WatchEvent] = []
    try:
        async with asyncio.timeout(20):
            async for event in api.watch(PODS, "ns", resource_version="7", label_selector="a=b"):
                found.append(event)
    except ApiError as error:
        return found, error
    return found, None


# ---- requests ---------------------------------------------------------------------------------------


async def test_requests_are_what_the_api_expects() -> None:
    async with scripted() as (script, api):
        for _ in range(5):
            script.then(script.json({"metadata": {}}))
        await api.create(RUNS, "ns", {"a": 1})
        await api.merge_patch(RUNS, "ns", "r", {"status": {"x": None}}, subresource="status")
        await api.replace(RUNS, "ns", "r", {"b": 2})
        await api.delete(PODS, "ns", "p", uid="u", grace_seconds=0, propagation="Background")
        await api.delete(PODS, "ns", "p")
    base = "/apis/trainyard.dev/v1alpha1/namespaces/ns/trainingruns"
    assert paths(script) == [
        f"POST {base}",
        f"PATCH {base}/r/status",
        f"PUT {base}/r",
        "DELETE /api/v1/namespaces/ns/pods/p",
        "DELETE /api/v1/namespaces/ns/pods/p",
    ]
    options = {"apiVersion": "v1", "kind": "DeleteOptions"}
    full = {"preconditions": {"uid": "u"}, "gracePeriodSeconds": 0, "propagationPolicy": "Background"}
    assert script.bodies == [{"a": 1}, {"status": {"x": None}}, {"b": 2}, options | full, options]
    types = [r.headers["Content-Type"] for r in script.requests]
    assert types[1] == "application/merge-patch+json" and types[0] == types[2] == "application/json"


@pytest.mark.parametrize("name", ["", "..", "a/b", "a?b", "a%2fb"])
async def test_a_name_cannot_become_another_path(name: str) -> None:
    async with scripted() as (script, api):
        with pytest.raises(ApiError, match="400"):
            await api.delete(PODS, "ns", name)
        assert script.requests == []


async def test_lists_follow_continue_tokens() -> None:
    async with scripted() as (script, api):
        page = {"metadata": {"resourceVersion": "9", "continue": "t1"}, "items": [1]}
        last = {"metadata": {"resourceVersion": "9"}, "items": [2]}
        script.then(script.json(page), script.json(last))
        found = await api.list(PODS, None, label_selector="a=b", limit=1)
    assert found == {"metadata": {"resourceVersion": "9"}, "items": [1, 2]}
    assert [dict(r.query) for r in script.requests] == [
        {"limit": "1", "labelSelector": "a=b"},
        {"limit": "1", "labelSelector": "a=b", "continue": "t1"},
    ]


async def test_an_expired_continue_token_starts_the_list_over() -> None:
    async with scripted() as (script, api):
        script.then(
            script.json({"metadata": {"resourceVersion": "1", "continue": "t"}, "items": ["old"]}),
            script.json(status(410, "Expired"), 410),
            script.json({"metadata": {"resourceVersion": "2"}, "items": ["new"]}),
        )
        assert (await api.list(PODS))["items"] == ["new"]


async def test_a_list_that_expires_again_and_again_is_given_up() -> None:
    async with scripted() as (script, api):
        for _ in range(3):
            script.then(
                script.json({"metadata": {"resourceVersion": "1", "continue": "t"}, "items": []}),
                script.json(status(410, "Expired"), 410),
            )
        with pytest.raises(ApiError, match="410"):
            await api.list(PODS)
        assert len(script.requests) == 6


async def test_a_null_list_is_an_empty_one() -> None:
    async with scripted() as (script, api):
        script.then(script.json({"metadata": {"resourceVersion": "1"}, "items": None}))
        assert (await api.list(PODS))["items"] == []


# ---- errors -----------------------------------------------------------------------------------------


async def test_errors_carry_the_status_and_when_to_come_back() -> None:
    async with scripted() as (script, api):
        script.then(
            script.json(status(409, "Conflict"), 409),
            script.json(status(429, "TooManyRequests"), 429, Retry_After="17"),
            script.json(status(500, "InternalError", retryAfterSeconds=4), 500),
            script.text("<html>" + "x" * 1000, 502),
        )
        caught = []
        for _ in range(4):
            with pytest.raises(ApiError) as info:
                await api.create(PODS, "ns", {})
            caught.append((info.value.status, info.value.reason, info.value.retry_after))
        assert caught == [
            (409, "Conflict", None),
            (429, "TooManyRequests", 17.0),
            (500, "InternalError", 4.0),
            (502, "Bad Gateway", None),
        ]
        assert len(info.value.message) <= 300


@pytest.mark.parametrize("code", [429, 503])
async def test_reads_are_tried_twice_and_writes_once(code: int) -> None:
    async with scripted() as (script, api):
        busy = script.json(status(code, "Busy"), code, Retry_After="0")
        script.then(busy, script.json({"ok": 1}), busy)
        assert await api.get(PODS, "ns", "p") == {"ok": 1}
        with pytest.raises(ApiError):
            await api.create(PODS, "ns", {})
        assert len(script.requests) == 3


async def test_a_long_retry_after_and_a_plain_refusal_are_left_to_the_caller() -> None:
    async with scripted() as (script, api):
        script.then(
            script.json(status(429, "Busy"), 429, Retry_After="30"),
            script.json(status(403, "Forbidden"), 403),
        )
        for expected in (429, 403):
            with pytest.raises(ApiError, match=str(expected)):
                await api.get(PODS, "ns", "p")
        assert len(script.requests) == 2


async def test_a_dropped_connection_and_a_silent_server_are_status_0() -> None:
    async with scripted(write_seconds=0.2) as (script, api):
        script.then(script.drop(), script.hang())
        for reason in ("ConnectionFailed", "Timeout"):
            with pytest.raises(ApiError) as info:
                await api.create(PODS, "ns", {})
            assert (info.value.status, info.value.reason) == (0, reason)


async def test_nobody_listening_and_a_closed_session_are_status_0() -> None:
    async with scripted() as (_, api):
        pass
    with pytest.raises(ApiError) as info:
        await api.create(PODS, "ns", {})
    assert (info.value.status, info.value.reason) == (0, "ConnectionFailed")
    _, error = await watch(api)
    assert error is not None and error.status == 0


@pytest.mark.parametrize("body", ["{", "[]", ""])
async def test_an_answer_that_is_no_object_is_an_error(body: str) -> None:
    async with scripted() as (script, api):
        script.then(script.text(body))
        with pytest.raises(ApiError) as info:
            await api.create(PODS, "ns", {})
        assert (info.value.status, info.value.reason) == (0, "BadAnswer")


async def test_redirects_are_not_followed() -> None:
    async with scripted() as (script, api):
        script.then(script.json({}, 302, Location="http://elsewhere.invalid/"))
        with pytest.raises(ApiError, match="302"):
            await api.create(PODS, "ns", {})


# ---- watches ----------------------------------------------------------------------------------------


async def test_a_watch_decodes_lines_however_they_are_cut() -> None:
    big = line("MODIFIED", 3, spec="x" * 3_000_000)
    whole = line("ADDED", 2) + big + line("BOOKMARK", 4)
    cuts = (
        0,
        5,
        len(line("ADDED", 2)) - 1,
        len(line("ADDED", 2)),
        200_000,
        2_000_000,
        len(whole) - 3,
        len(whole),
    )
    async with scripted() as (script, api):
        script.then(script.stream(*(whole[a:b] for a, b in itertools.pairwise(cuts)), every=0.01))
        found, error = await watch(api)
    assert error is None and [e.type for e in found] == ["ADDED", "MODIFIED", "BOOKMARK"]
    assert len(found[1].object["spec"]) == 3_000_000
    assert dict(script.requests[0].query) == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": "7",
        "timeoutSeconds": "300",
        "labelSelector": "a=b",
    }


def answer_of(script: Script, name: str) -> Any:
    error = json.dumps({"type": "ERROR", "object": status(410, "Expired")}).encode() + b"\n"
    internal = json.dumps(
        {"type": "ERROR", "object": status(500, "InternalError", retryAfterSeconds=3)}
    ).encode()
    return {
        "gone as status": script.json(status(410, "Expired"), 410),
        "gone in the stream": script.stream(line("ADDED"), error),
        "error in the stream": script.stream(line("ADDED"), internal + b"\n"),
        "too many requests": script.json(status(429, "TooManyRequests"), 429, Retry_After="1"),
        "half a line": script.stream(line("ADDED"), b'{"type":"ADD'),
        "reset": script.stream(line("ADDED"), then="abort"),
        "reset in a line": script.stream(line("ADDED"), b'{"type":"ADD', then="abort"),
        "no json": script.stream(line("ADDED"), b"oops\n"),
        "no event": script.stream(line("ADDED"), b"[1]\n"),
        "silence": script.stream(line("ADDED"), then="stall"),
        "a byte now and then": script.stream(line("ADDED"), *[b"{"] * 100, every=0.02),
        "no headers": script.hang(),
    }[name]


@pytest.mark.parametrize(
    ("fault", "code", "reason", "seen"),
    [
        ("gone as status", 410, "Expired", 0),
        ("gone in the stream", 410, "Expired", 1),
        ("error in the stream", 500, "InternalError", 1),
        ("too many requests", 429, "TooManyRequests", 0),
        ("half a line", 0, "BadAnswer", 1),
        ("reset", 0, "ConnectionFailed", 1),
        ("reset in a line", 0, "ConnectionFailed", 1),
        ("no json", 0, "BadAnswer", 1),
        ("no event", 0, "BadAnswer", 1),
        ("silence", 0, "Inactive", 1),
        ("a byte now and then", 0, "Inactive", 1),
        ("no headers", 0, "Inactive", 0),
    ],
)
async def test_a_watch_that_ends_badly_says_how(fault: str, code: int, reason: str, seen: int) -> None:
    async with scripted(inactivity_seconds=0.4) as (script, api):
        script.then(answer_of(script, fault))
        found, error = await watch(api)
    assert error is not None and (error.status, error.reason, len(found)) == (code, reason, seen)
    if code == 500:
        assert error.retry_after == 3


async def test_a_slow_consumer_is_not_an_inactive_server() -> None:
    async with scripted(inactivity_seconds=0.3) as (script, api):
        script.then(script.stream(line("ADDED", 1) + line("ADDED", 2), line("ADDED", 3)))
        versions = []
        async for event in api.watch(PODS, "ns", resource_version="0"):
            versions.append(event.object["metadata"]["resourceVersion"])
            await asyncio.sleep(0.4)
    assert versions == ["1", "2", "3"]


async def test_leaving_a_watch_closes_its_connection() -> None:
    async with scripted() as (script, api):
        script.then(script.stream(line("ADDED"), then="stall"))
        stream: Any = api.watch(PODS, "ns", resource_version="0")
        await anext(stream)
        transport = script.requests[0].transport
        assert transport is not None and not transport.is_closing()
        await stream.aclose()
        async with asyncio.timeout(10):
            while not transport.is_closing():  # noqa: ASYNC110 - a transport has no event
                await asyncio.sleep(0.01)


async def test_an_endless_line_is_bounded() -> None:
    async def endless() -> Any:
        while True:
            yield b"x" * 1000

    with pytest.raises(LineTooLong):
        async for _ in iterate(endless(), 10, max_line=10_000):
            pass
