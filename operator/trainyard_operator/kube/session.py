"""One pool of connections to the API server, for kopf and for our own client."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp
import yarl

from trainyard_operator.kube.credentials import Credentials, TokenSource

CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 30.0
MAX_CONNECTIONS = 100
KEEPALIVE_SECONDS = 60.0

Observer = Callable[[str, str, str, float], None]
"""(verb, resource, code, seconds) of each request when its headers are there; code is "error" if none came.
Verb and resource are spelled as in the API server's own metrics: LIST pods, PATCH trainingruns/status."""


@dataclass(frozen=True, slots=True)
class Connection:
    """The session, and where it leads."""

    session: aiohttp.ClientSession
    server: str
    """URL without a slash at its end."""
    settings: Mapping[str, Any]
    """What the session was made with, to make further ones over the same connections."""

    def lend(self) -> aiohttp.ClientSession:
        """A session over the same connections that its receiver may close.

        kopf closes the session it is given, both at its end and, to log in anew, after a 401
        (kopf/_cogs/structs/credentials.py, Vault.invalidate); ours must live on. A new one for each login:

            kopf.AiohttpSession(server=connection.server, aiohttp_session=connection.lend())
        """
        return aiohttp.ClientSession(connector=self.session.connector, connector_owner=False, **self.settings)

    async def close(self) -> None:
        """Closes all connections; requests under way fail."""
        await self.session.close()


def connect(
    credentials: Credentials, *, observer: Observer | None = None, user_agent: str = "trainyard-operator"
) -> Connection:
    """A connection with these credentials; opens nothing yet. Must be called in a running event loop."""
    settings: dict[str, Any] = {
        "headers": {"User-Agent": user_agent},
        "timeout": aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS),
        "middlewares": (_bearer(credentials.token, credentials.server),) if credentials.token else (),
        "trace_configs": [_trace(observer)] if observer else [],
    }
    connector = aiohttp.TCPConnector(
        ssl=credentials.tls if credentials.tls is not None else True,
        limit=MAX_CONNECTIONS,
        keepalive_timeout=KEEPALIVE_SECONDS,
    )
    return Connection(aiohttp.ClientSession(connector=connector, **settings), credentials.server, settings)


def _bearer(source: TokenSource, server: str) -> aiohttp.ClientMiddlewareType:
    """Sends the token to our server only (never after a redirect), and asks for a new one after a 401."""
    origin = yarl.URL(server).origin()

    async def middleware(
        request: aiohttp.ClientRequest,
        handler: Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]],
    ) -> aiohttp.ClientResponse:
        if request.url.origin() != origin:
            return await handler(request)
        token = await source.token()
        request.headers["Authorization"] = f"Bearer {token}"
        response = await handler(request)
        if response.status == 401:
            renewed = await source.token(refused=True)
            if renewed != token:
                response.release()
                request.headers["Authorization"] = f"Bearer {renewed}"
                response = await handler(request)
        return response

    return middleware


def _trace(observer: Observer) -> aiohttp.TraceConfig:
    async def start(
        session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestStartParams
    ) -> None:
        context.started = time.monotonic()

    async def end(
        session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestEndParams
    ) -> None:
        verb, resource = describe(params.method, params.url)
        observer(verb, resource, str(params.response.status), time.monotonic() - context.started)

    async def failed(
        session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestExceptionParams
    ) -> None:
        verb, resource = describe(params.method, params.url)
        observer(verb, resource, "error", time.monotonic() - context.started)

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(start)
    trace.on_request_end.append(end)
    trace.on_request_exception.append(failed)
    return trace


def describe(method: str, url: yarl.URL) -> tuple[str, str]:
    """(verb, resource) of a request, so that metrics have few labels: no names, no namespaces."""
    parts = [p for p in url.path.split("/") if p]
    depth = {"api": 2, "apis": 3}.get(parts[0] if parts else "", 0)
    if not depth or len(parts) <= depth:
        return method, "other"
    rest = parts[depth:]
    if rest[0] == "namespaces" and len(rest) > 2:
        rest = rest[2:]
    resource = "/".join([rest[0], *rest[2:3]])
    if method != "GET":
        return method, resource
    if "watch" in url.query:
        return "WATCH", resource
    return ("GET" if len(rest) > 1 else "LIST"), resource
