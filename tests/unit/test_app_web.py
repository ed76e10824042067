"""Probes over real HTTP: what is red when, and that it says why."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from tests.fakes.clock import FakeClock
from trainyard_operator.metrics import Metrics
from trainyard_operator.web import (
    WATCH_SECONDS,
    WORKER_SECONDS,
    Checks,
    LoopMonitor,
    WebServer,
    application,
    watches_live,
    workers_live,
)


async def get(checks: Checks, path: str) -> tuple[int, str]:
    server = WebServer(application(checks, Metrics().registry))
    port = await server.start("127.0.0.1", 0)
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}{path}") as answer,
        ):
            return answer.status, await answer.text()
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("path", "alive", "ready", "status", "text"),
    [
        ("/healthz", "", "no", 200, "[+] a\n"),
        ("/readyz", "", "no", 503, "[+] a\n[-] b: no\n"),
        ("/readyz", "", "", 200, "[+] a\n[+] b\n"),
        ("/healthz", "stuck", "", 503, "[-] a: stuck\n"),
        ("/readyz", "stuck", "", 503, "[-] a: stuck\n[+] b\n"),
    ],
)
async def test_probes_say_which_check_fails(
    path: str, alive: str, ready: str, status: int, text: str
) -> None:
    checks = Checks(alive={"a": lambda: alive}, ready={"b": lambda: ready})
    assert await get(checks, path) == (status, text)


async def test_metrics_are_served_as_prometheus_text() -> None:
    status, text = await get(Checks(alive={}, ready={}), "/metrics")
    assert status == 200 and "# TYPE trainyard_beats_total counter" in text


def test_a_silent_watch_is_dead_unless_the_api_server_is_silent_altogether() -> None:
    clock = FakeClock()
    began = clock.now
    answered = [began]
    heard = {"pods": began, "trainingruns": began}
    check = watches_live(lambda: heard, lambda: answered[0], clock)
    clock.now += WATCH_SECONDS + 1
    heard["pods"] = clock.now
    assert check() == "", "the API server has not answered anything for as long: it is away"
    answered[0] = clock.now
    assert check() == f"nothing from the watch of trainingruns for {WATCH_SECONDS + 1:.0f} s"


def test_a_worker_that_is_stuck_is_named() -> None:
    age = [WORKER_SECONDS]
    check = workers_live(lambda: age[0], lambda: [("ns", "run")])
    assert check() == ""
    age[0] += 1
    assert "121 s" in check() and "run" in check()


async def test_after_a_stall_nobody_is_called_silent_for_the_time_of_it() -> None:
    clock = FakeClock()
    begin = clock.time()
    monitor = LoopMonitor(lambda lag: None, clock, interval=0.5)
    task = asyncio.create_task(monitor.run())
    await clock.advance(5.0)
    assert monitor.awake_since(begin) == begin
    clock.now += 30.0  # the node stood still
    woken = clock.time()
    assert monitor.awake_since(begin) == woken, "also before the first timer has run"
    await clock.advance(4.0)
    assert monitor.awake_since(begin) == pytest.approx(woken, abs=0.6)
    assert monitor.awake_since(woken + 2) == woken + 2, "a later begin wins"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_loop_monitor_measures_and_notices() -> None:
    clock, lags = FakeClock(), list[float]()
    monitor = LoopMonitor(lags.append, clock, interval=0.5)
    task = asyncio.create_task(monitor.run())
    await clock.advance(1.0)
    assert lags == [0.0, 0.0] and monitor.check() == ""
    clock.now += 3.0  # the loop was blocked: no timer ran meanwhile
    await clock.advance(0.0)
    assert lags[-1] == pytest.approx(2.5)
    clock.now += 11.0
    assert "no timer for 11 s" in monitor.check()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
