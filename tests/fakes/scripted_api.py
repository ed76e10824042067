"""An HTTP server on loopback that answers what a test wrote down: for faults that no API server makes on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from trainyard_operator.kube.client import HttpApi
from trainyard_operator.kube.credentials import Credentials
from trainyard_operator.kube.session import Connection, Observer, connect

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Script:
    """Answers in order; a request beyond the last one fails the test by its 599."""

    answers: list[Answer] = field(default_factory=list)
    requests: list[web.Request] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    connection: Connection | None = None
    released: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the end: handlers that stall wait for it."""

    def then(self, *answers: Answer) -> None:
        self.answers.extend(answers)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.json() if request.can_read_body else None)
        if not self.answers:
            return web.json_response({"reason": "ScriptIsOver"}, status=599)
        return await self.answers.pop(0)(request)

    # ---- kinds of answers ---------------------------------------------------------------------------

    def json(self, body: Any, status: int = 200, **headers: str) -> Answer:
        async def answer(request: web.Request) -> web.StreamResponse:
            return web.json_response(
                body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
            )

        return answer

    def text(self, text: str, status: int = 200) -> Answer:
        async def answer(request: web.Request) -> web.StreamResponse:
            return web.Response(text=text, status=status)

        return answer

    def drop(self) -> Answer:
        """Closes the connection without an answer."""

        async def answer(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        return answer

    def hang(self) -> Answer:
        """Never answers."""

        async def answer(request: web.Request) -> web.StreamResponse:
            await self.released.wait()
            return web.Response()

        return answer

    def stream(self, *chunks: bytes, then: str = "close", every: float = 0.0) -> Answer:
        """Chunks of a watch, and then: "close" it well, "abort" the connection, or "stall" until the end."""

        async def answer(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            for chunk in chunks:
                await response.write(chunk)
                await asyncio.sleep(every)
            if then == "stall":
                await self.released.wait()
            elif then == "abort":
                assert request.transport is not None
                request.transport.abort()
            return response

        return answer


@asynccontextmanager
async def scripted(
    observer: Observer | None = None, credentials: Callable[[str], Credentials] | None = None, **options: Any
) -> AsyncIterator[tuple[Script, HttpApi]]:
    """A server with an empty script, and a client of it."""
    script = Script()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", script.handle)
    async with TestServer(app) as server:
        url = str(server.make_url("")).rstrip("/")
        connection = connect(credentials(url) if credentials else Credentials(url, None), observer=observer)
        script.connection = connection
        try:
            yield script, HttpApi(connection, **options)
        finally:
            script.released.set()
            await connection.close()


def paths(script: Script) -> Sequence[str]:
    return [f"{r.method} {r.path}" for r in script.requests]
