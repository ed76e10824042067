"""The HTTPS server for agents: `POST /v1/runs/{uid}/beat` of `trainyard_api.protocol`, and nothing else.

Order of the checks: can this process tell at all (503), is the body bearable (413), is the caller a pod
(401), is the beat well-formed (400) and spoken in a known contract (426), is it that pod's own (403), do run
and pod exist (410), do they belong together (403). What is unknown to a process that is not the leader or
has no full caches is never called gone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import ssl
from collections.abc import Callable
from typing import Protocol

from aiohttp import web

from trainyard_api.contract import CONTRACT
from trainyard_api.protocol import BEAT_SECONDS, MAX_BODY, Beat
from trainyard_operator.clock import Clock
from trainyard_operator.coordinator.registry import Registry, SupersededError
from trainyard_operator.coordinator.tokens import (
    Identity,
    TokenRefusedError,
    TokenReviewer,
    TokenUnavailableError,
)

log = logging.getLogger(__name__)

READ_SECONDS = 10.0
"""Longest time that a body may take to arrive."""
HANDSHAKE_SECONDS = 10.0
STOP_SECONDS = 2.0
BACKLOG = 1024
UNKNOWN_POD_SECONDS = 10.0
"""How long a pod with a good token may be missing from the cache before it is called gone: the watch may lag
behind the API server, and "gone" ends training in that pod."""
MAX_UNKNOWN_PODS = 4096


class Fleet(Protocol):
    """What the server must know of the cluster: answered from caches, at once."""

    def serving(self) -> bool:
        """Whether this process is the leader and its caches are complete."""
        ...

    def run_exists(self, run_uid: str) -> bool: ...

    def owner_of(self, pod_uid: str) -> str | None:
        """UID of the run that controls the pod; "" if none does; None if there is no such pod."""
        ...


class Refusal(Exception):
    """An answer other than a directive."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(f"{status}: {why}")
        self.status = status
        self.why = why

    def response(self) -> web.Response:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.status == 503:
            headers["Retry-After"] = "1"
        if self.status == 413:
            headers["Connection"] = "close"
        return web.json_response({"error": self.why}, status=self.status, headers=headers)


class Coordinator:
    """Beats in, directives out. `on_answer(status)` is told of every answer, for metrics."""

    def __init__(
        self,
        *,
        registry: Registry,
        tokens: TokenReviewer,
        fleet: Fleet,
        clock: Clock,
        on_answer: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._registry = registry
        self._tokens = tokens
        self._fleet = fleet
        self._clock = clock
        self._on_answer = on_answer
        self._unknown: dict[str, float] = {}

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_post("/v1/runs/{uid}/beat", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.Response:
        try:
            response = await self._beat(request)
        except Refusal as refusal:
            response = refusal.response()
        self._on_answer(response.status)
        return response

    async def _beat(self, request: web.Request) -> web.Response:
        run_uid = request.match_info["uid"]
        if not self._fleet.serving():
            raise Refusal(503, "this operator is not the leader, or has not read the cluster yet")
        if (request.content_length or 0) > MAX_BODY:
            raise Refusal(413, f"a beat has at most {MAX_BODY} bytes")
        identity = await self._authenticate(request)
        beat = await _read(request)
        self._check(run_uid, beat, identity)
        try:
            self._registry.hear(run_uid, beat)
        except SupersededError:
            raise Refusal(403, f"a newer agent of pod {beat.pod_name} was heard") from None
        wait = min(max(beat.wait, 0.0), BEAT_SECONDS)
        answer = await self._registry.wait(run_uid, beat.pod_uid, beat.seen, wait)
        if answer is None:
            if self._fleet.serving() and not self._fleet.run_exists(run_uid):
                raise Refusal(410, f"there is no run {run_uid}")
            raise Refusal(503, "it is not decided yet what this pod is to do")
        return web.Response(body=answer.body, content_type="application/json")

    async def _authenticate(self, request: web.Request) -> Identity:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "no bearer token")
        try:
            return await self._tokens.identity(token.strip())
        except TokenRefusedError as refused:
            raise Refusal(401, str(refused)) from None
        except TokenUnavailableError as unavailable:
            log.warning("cannot check an agent's token: %s", unavailable)
            raise Refusal(503, "the token cannot be checked now") from None

    def _check(self, run_uid: str, beat: Beat, identity: Identity) -> None:
        """That this pod may speak here. Raises Refusal."""
        if beat.contract > CONTRACT:
            raise Refusal(426, f"the agent speaks contract {beat.contract}, this operator knows {CONTRACT}")
        if beat.pod_uid != identity.pod_uid or (identity.pod_name and beat.pod_name != identity.pod_name):
            raise Refusal(403, "the token belongs to another pod")
        if not self._fleet.run_exists(run_uid):
            raise Refusal(410, f"there is no run {run_uid}")
        owner = self._fleet.owner_of(beat.pod_uid)
        if owner is None:
            raise self._missing(beat.pod_uid)
        if owner != run_uid:
            raise Refusal(403, f"the pod does not belong to run {run_uid}")

    def _missing(self, pod_uid: str) -> Refusal:
        """The answer for a pod with a good token that the cache does not have."""
        now = self._clock.monotonic()
        if len(self._unknown) >= MAX_UNKNOWN_PODS:
            self._unknown = {uid: t for uid, t in self._unknown.items() if now - t < 6 * UNKNOWN_POD_SECONDS}
        if now - self._unknown.setdefault(pod_uid, now) < UNKNOWN_POD_SECONDS:
            return Refusal(503, "the pod is not in this operator's cache yet")
        return Refusal(410, "the pod is gone")


def _integer(text: str) -> int:
    if len(text) > 16:  # beyond 2**53 a status could not carry it
        raise ValueError(f"the number {text[:16]}... is too large")
    return int(text)


def _real(text: str) -> float | None:
    """Infinity and NaN count as "not said": JSON has no word for them, and the API server refuses them.

    A diverged loss is no reason to call the agent's beats malformed, and so the agent lost.
    """
    value = float(text)
    return value if math.isfinite(value) else None


async def _read(request: web.Request) -> Beat:
    try:
        async with asyncio.timeout(READ_SECONDS):
            raw = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise Refusal(413, f"a beat has at most {MAX_BODY} bytes") from None
    except TimeoutError:
        raise Refusal(408, f"the beat did not arrive within {READ_SECONDS:.0f} s") from None
    try:
        return Beat.from_json(json.loads(raw, parse_int=_integer, parse_float=_real, parse_constant=_real))
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"not a beat: {error}") from None


class CoordinatorServer:
    """A running server. `tls=None` (plain HTTP) is for tests of the protocol only."""

    def __init__(self, coordinator: Coordinator, registry: Registry, tls: ssl.SSLContext | None) -> None:
        self._registry = registry
        # Cancelled when the agent hangs up: its place among the waiters is free at once.
        self._runner = web.AppRunner(
            coordinator.application(), access_log=None, handler_cancellation=True, keepalive_timeout=75.0
        )
        self._tls = tls
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listens; returns the port (useful with port 0). Raises OSError."""
        await self._runner.setup()
        handler = self._runner.server
        if handler is None:
            raise RuntimeError("the runner has no server after setup")
        self._server = await asyncio.get_running_loop().create_server(
            handler,
            host,
            port,
            backlog=BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=HANDSHAKE_SECONDS if self._tls else None,
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Answers who waits, then closes within about STOP_SECONDS."""
        self._registry.close()
        if self._server is not None:
            self._server.close()
        await asyncio.sleep(0)
        if self._runner.server is not None:
            await self._runner.server.shutdown(STOP_SECONDS)
        await self._runner.cleanup()
