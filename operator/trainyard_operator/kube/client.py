"""`HttpApi`: the `Api` protocol over HTTP, with bounds on everything."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import aiohttp

from trainyard_operator.kube.api import ApiError, Object, Resource, WatchEvent
from trainyard_operator.kube.credentials import CredentialsError
from trainyard_operator.kube.lines import LineTooLong, Truncated, iterate
from trainyard_operator.kube.session import CONNECT_SECONDS, REQUEST_SECONDS, Connection

WRITE_SECONDS = 10.0
INACTIVITY_SECONDS = 70.0
"""The API server sends a bookmark a minute; without one for longer the connection is dead."""
RETRIED = frozenset({0, 429, 500, 502, 503, 504})
"""Answers to reads that are worth a second try."""
RETRY_DELAY = (0.1, 0.5)
MAX_RETRY_AFTER = 2.0
"""Seconds. A server that wants us to wait longer is left to the caller, who has other things to do."""
EXPIRED_LISTS = 3
"""How often a list is started over because its continue token expired (after 5 minutes, by default)."""

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"


class HttpApi:
    """See `Api`. Status 0 means that no whole answer came.

    Its reasons: Timeout, ConnectionFailed, BadAnswer, Inactive, and NoCredentials when nothing was sent.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        read_seconds: float = REQUEST_SECONDS,
        write_seconds: float = WRITE_SECONDS,
        inactivity_seconds: float = INACTIVITY_SECONDS,
        rng: random.Random | None = None,
    ) -> None:
        self._connection = connection
        self._read_seconds = read_seconds
        self._write_seconds = write_seconds
        self._inactivity_seconds = inactivity_seconds
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        return await self._read(self._url(resource, namespace, name), {})

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = 500,
    ) -> Object:
        url = self._url(resource, namespace)
        query = {"limit": str(limit)}
        if label_selector:
            query["labelSelector"] = label_selector
        if field_selector:
            query["fieldSelector"] = field_selector
        for last in (False,) * (EXPIRED_LISTS - 1) + (True,):
            try:
                return await self._pages(url, query)
            except ApiError as error:
                # The snapshot that the continue token names was compacted away. (A first page cannot be.)
                if error.status != 410 or last:
                    raise
        raise AssertionError("unreachable")

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        return await self._write("POST", self._url(resource, namespace), body)

    async def merge_patch(
        self, resource: Resource, namespace: str, name: str, body: Object, *, subresource: str | None = None
    ) -> Object:
        return await self._write(
            "PATCH", self._url(resource, namespace, name, subresource), body, MERGE_PATCH
        )

    async def replace(self, resource: Resource, namespace: str, name: str, body: Object) -> Object:
        return await self._write("PUT", self._url(resource, namespace, name), body)

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
        propagation: str | None = None,
    ) -> None:
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        if propagation is not None:
            options["propagationPolicy"] = propagation
        await self._write("DELETE", self._url(resource, namespace, name), options)

    async def watch(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        resource_version: str,
        label_selector: str = "",
        timeout_seconds: int = 300,
    ) -> AsyncIterator[WatchEvent]:
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_seconds),
        }
        if label_selector:
            query["labelSelector"] = label_selector
        url = self._url(resource, namespace)
        patience = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        try:
            async with asyncio.timeout(self._inactivity_seconds):
                response = await self._connection.session.get(
                    url, params=query, timeout=patience, allow_redirects=False
                )
            async with response:
                if response.status != 200:
                    async with asyncio.timeout(self._inactivity_seconds):
                        raise await _failure(response)
                async with aclosing(iterate(response.content.iter_any(), self._inactivity_seconds)) as lines:
                    async for line in lines:
                        yield _event(line)
        except TimeoutError:
            raise ApiError(
                0, "Inactive", f"no event from {url} for {self._inactivity_seconds:.0f} s"
            ) from None
        except (Truncated, LineTooLong) as error:
            raise ApiError(0, "BadAnswer", f"watch of {url}: {error}") from None
        except (aiohttp.ClientError, CredentialsError, OSError, RuntimeError) as error:
            raise _unreachable(url, error) from error

    # ---- inside -------------------------------------------------------------------------------------

    def _url(
        self,
        resource: Resource,
        namespace: str | None,
        name: str | None = None,
        subresource: str | None = None,
    ) -> str:
        for part in (namespace, name):
            # Names come from the API and are DNS labels; one that is not must not become another path.
            if part is not None and (not part or part in (".", "..") or any(c in part for c in "/?#%\\")):
                raise ApiError(400, "BadRequest", f"{part!r} cannot be part of a path")
        return self._connection.server + resource.path(namespace, name, subresource)

    async def _pages(self, url: str, query: Mapping[str, str]) -> Object:
        items: list[Object] = []
        page = await self._read(url, query)
        items += page.get("items") or ()
        while token := page["metadata"].get("continue"):
            page = await self._read(url, {**query, "continue": token})
            items += page.get("items") or ()
        return {**page, "items": items}

    async def _read(self, url: str, query: Mapping[str, str]) -> Object:
        """GET with one more try when that may help."""
        try:
            return await self._request("GET", url, self._read_seconds, params=query)
        except ApiError as error:
            wait = error.retry_after if error.retry_after is not None else self._rng.uniform(*RETRY_DELAY)
            if error.status not in RETRIED or wait > MAX_RETRY_AFTER:
                raise
        await asyncio.sleep(wait)
        return await self._request("GET", url, self._read_seconds, params=query)

    async def _write(self, method: str, url: str, body: Object, content_type: str = JSON) -> Object:
        """Never retried here: an answer that was lost may mean that the write was made."""
        data = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
        return await self._request(
            method, url, self._write_seconds, data=data, headers={"Content-Type": content_type}
        )

    async def _request(self, method: str, url: str, seconds: float, **options: Any) -> Object:
        patience = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        try:
            async with self._connection.session.request(
                method, url, timeout=patience, allow_redirects=False, **options
            ) as response:
                if response.status // 100 != 2:
                    raise await _failure(response)
                data = await response.read()
        except TimeoutError:  # before ClientError: aiohttp's time-outs are both
            raise ApiError(0, "Timeout", f"{method} {url}: no answer within {seconds:.0f} s") from None
        except (aiohttp.ClientError, CredentialsError, OSError, RuntimeError) as error:
            raise _unreachable(f"{method} {url}", error) from error
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise ApiError(0, "BadAnswer", f"{method} {url}: {error}") from None
        if not isinstance(answer, dict):
            raise ApiError(0, "BadAnswer", f"{method} {url}: not a JSON object")
        return answer


def _event(line: bytes) -> WatchEvent:
    try:
        decoded = json.loads(line)
        kind, obj = decoded["type"], decoded["object"]
    except (ValueError, KeyError, TypeError) as error:
        raise ApiError(0, "BadAnswer", f"a watch sent a line that is no event: {error!r}") from None
    if kind == "ERROR":
        raise _status_error(obj, int(obj.get("code") or 500), None)
    return WatchEvent(kind, obj)


async def _failure(response: aiohttp.ClientResponse) -> ApiError:
    """The error that an answer other than 2xx stands for."""
    text = await response.text(errors="replace")
    try:
        status = json.loads(text)
    except ValueError:
        status = None
    if not isinstance(status, dict):  # from a proxy on the way, not from the API server
        status = {"reason": response.reason or "", "message": text[:300]}
    return _status_error(status, response.status, response.headers.get("Retry-After"))


def _status_error(status: Object, code: int, header: str | None) -> ApiError:
    """From a metav1.Status. `header` is Retry-After (only its form in seconds is used by API servers)."""
    details = status.get("details") or {}
    retry_after = details.get("retryAfterSeconds")
    if header is not None and header.isdigit():
        retry_after = header
    return ApiError(
        code,
        str(status.get("reason") or "Unknown"),
        str(status.get("message") or ""),
        float(retry_after) if retry_after else None,
        tuple(str(c.get("reason", "")) for c in details.get("causes") or ()),
    )


def _unreachable(what: str, error: Exception) -> ApiError:
    reason = "NoCredentials" if isinstance(error, CredentialsError) else "ConnectionFailed"
    return ApiError(0, reason, f"{what}: {str(error) or type(error).__name__}")
