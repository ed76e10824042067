"""/healthz, /readyz and /metrics on one port, plain HTTP: for the kubelet and for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from trainyard_operator.clock import Clock

WATCH_SECONDS = 180.0
"""A watch that brought no event and no bookmark for so long is dead: the API server sends a bookmark about
every minute (KEP-956)."""
API_SECONDS = 60.0
WORKER_SECONDS = 120.0
LAG_SECONDS = 10.0
STALL_SECONDS = 2.0
"""A timer that is later than this found the loop standing still: beats may have been missed."""

Check = Callable[[], str]
"""Empty when all is well, else what is wrong."""


@dataclass(frozen=True, slots=True)
class Checks:
    """What the two probes ask, in the order in which answers are printed."""

    alive: Mapping[str, Check]
    ready: Mapping[str, Check]


def watches_live(
    last_heard: Callable[[], Mapping[str, float]], api_answered: Callable[[], float], clock: Clock
) -> Check:
    """`last_heard`: by resource the monotonic time of the newest event, bookmark or list.

    With an API server that answers nothing at all (`api_answered`: the monotonic time of its last answer) the
    check passes: starting this process again could not help, and would forget what agents said.
    """

    def check() -> str:
        now = clock.monotonic()
        if now - api_answered() > API_SECONDS:
            return ""
        silent = {n: now - t for n, t in last_heard().items() if now - t > WATCH_SECONDS}
        return ", ".join(f"nothing from the watch of {n} for {age:.0f} s" for n, age in silent.items())

    return check


def workers_live(longest: Callable[[], float], in_flight: Callable[[], Iterable[object]]) -> Check:
    """`longest`: seconds for which the slowest reconcile has been running; `in_flight`: what is reconciled."""

    def check() -> str:
        age = longest()
        if age <= WORKER_SECONDS:
            return ""
        return f"a reconcile runs for {age:.0f} s, one of: {', '.join(sorted(map(str, in_flight())))[:500]}"

    return check


class LoopMonitor:
    """Measures how late the event loop runs its timers; `on_lag` gets each measurement in seconds.

    A loop that stood still (a node under pressure, a paused VM) heard nobody meanwhile: `awake_since` tells from
    when on the silence of an agent means something.
    """

    def __init__(self, on_lag: Callable[[float], None], clock: Clock, interval: float = 0.5) -> None:
        self._on_lag = on_lag
        self._clock = clock
        self._interval = interval
        self._last = clock.monotonic()
        self._stalled_until: float | None = None

    async def run(self) -> None:
        while True:
            due = self._clock.monotonic() + self._interval
            await self._clock.sleep(self._interval)
            self._last = self._clock.monotonic()
            if self._last - due > STALL_SECONDS:
                self._stalled_until = self._last
            self._on_lag(max(self._last - due, 0.0))

    def awake_since(self, begin: float) -> float:
        """Since when (Unix seconds) this process hears its agents without a break; `begin` if there was none.

        Also right after a stall, before the first timer has run.
        """
        now = self._clock.monotonic()
        if now - self._last > self._interval + STALL_SECONDS:
            self._stalled_until = now
        if self._stalled_until is None:
            return begin
        return max(begin, self._clock.time() - (now - self._stalled_until))

    def check(self) -> str:
        """A loop that is blocked cannot answer at all; this also sees one that has just come back."""
        age = self._clock.monotonic() - self._last
        return f"the event loop ran no timer for {age:.0f} s" if age > LAG_SECONDS else ""


def application(checks: Checks, registry: CollectorRegistry) -> web.Application:
    """The three endpoints. A probe answers 200 or 503, a line for each check."""

    async def healthz(request: web.Request) -> web.Response:
        return _probe(checks.alive.items())

    async def readyz(request: web.Request) -> web.Response:
        return _probe([*checks.alive.items(), *checks.ready.items()])

    async def metrics(request: web.Request) -> web.Response:
        body = generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


def _probe(checks: Iterable[tuple[str, Check]]) -> web.Response:
    lines, failed = [], False
    for name, check in checks:
        why = check()
        failed = failed or bool(why)
        lines.append(f"[-] {name}: {why}" if why else f"[+] {name}")
    return web.Response(text="\n".join(lines) + "\n", status=503 if failed else 200)


class WebServer:
    """A running server of `application`."""

    def __init__(self, app: web.Application) -> None:
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def start(self, host: str, port: int) -> int:
        """Listens; returns the port. Raises OSError."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        async with asyncio.timeout(2):
            await self._runner.cleanup()
