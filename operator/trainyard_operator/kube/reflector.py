"""Keeps a `Store` equal to what the API server has: list, then watch, for ever.

client-go's reflector (tools/cache/reflector.go) with what kopf lacks: objects that vanished while we were
not watching are reported as deleted after a re-list.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter

from trainyard_operator.clock import Clock, SystemClock
from trainyard_operator.kube.api import Api, ApiError, Resource, WatchEvent
from trainyard_operator.kube.store import OnChange, Store

MIN_BACKOFF = 0.2
MAX_BACKOFF = 30.0
"""Seconds; jitter takes up to half of it off."""
WATCH_SECONDS = (240, 300)
"""A watch asks to be closed after a random time in this range, so that watches do not end together."""
SHORT_WATCH = 1.0
"""Seconds. A watch that ends sooner and brought nothing counts as an error, or we would spin."""
RELIST_AFTER = 3
"""Failed watches in a row after which the version itself is doubted."""

log = logging.getLogger(__name__)


class Reflector:
    """Mirrors one resource (of one namespace, or all with None) into `store`.

    `on_change` is subscribed to the store. Several reflectors may share a store if their namespaces differ.
    """

    def __init__(  # noqa: PLR0917 - in the order of an informer's
        self,
        api: Api,
        resource: Resource,
        namespace: str | None,
        label_selector: str,
        store: Store,
        on_change: OnChange | None = None,
        *,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._api = api
        self._resource = resource
        self._namespace = namespace
        self._selector = label_selector
        self._store = store
        if on_change is not None:
            store.subscribe(on_change)
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._version = ""
        """Where to watch from; empty: a list is needed."""
        self._newest = 0
        """Highest version that a list or a watch told."""
        self._failures = 0
        self.synced = asyncio.Event()
        """Set when the first list is in the store."""
        self.last_event_monotonic = self._clock.monotonic()
        """When the server last said anything: a list, an event or a bookmark. For the liveness probe."""
        self.restarts: Counter[str] = Counter()
        """Ends of watches by reason: closed, short, expired, inactive, error-<status>, exception."""

    async def run(self) -> None:
        """Ends only by cancellation; every error is logged, counted and followed by a back-off."""
        while True:
            reason, error = "closed", None
            try:
                await self._round()
            except ApiError as caught:
                reason, error = _reason(caught), caught
            except _ShortWatch:
                reason = "short"
            except Exception:
                reason = "exception"
                self._version = ""
                log.exception("the watch of %s failed in a way that it should not", self._resource.plural)
            self.restarts[reason] += 1
            if reason == "closed":
                self._failures = 0
                continue
            self._failures += 1
            if reason == "expired" or self._failures % RELIST_AFTER == 0:
                self._version = ""
            delay = self._delay(error)
            log.warning(
                "watch of %s ended (%s: %s), again in %.1f s",
                self._resource.plural,
                reason,
                error or "no answer worth naming",
                delay,
            )
            await self._clock.sleep(delay)

    def _delay(self, error: ApiError | None) -> float:
        nominal = min(MAX_BACKOFF, MIN_BACKOFF * 2.0 ** min(self._failures - 1, 32))
        asked = min(error.retry_after or 0.0, MAX_BACKOFF) if error else 0.0
        return max(asked, nominal * self._rng.uniform(0.5, 1))

    async def _round(self) -> None:
        """A list if one is needed, and one watch."""
        if not self._version:
            await self._list()
        started, events = self._clock.monotonic(), 0
        stream = self._api.watch(
            self._resource,
            self._namespace,
            resource_version=self._version,
            label_selector=self._selector,
            timeout_seconds=self._rng.randint(*WATCH_SECONDS),
        )
        try:
            async for event in stream:
                events += 1
                self._failures = 0
                self._take(event)
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
        if not events and self._clock.monotonic() - started < SHORT_WATCH:
            raise _ShortWatch

    async def _list(self) -> None:
        answer = await self._api.list(self._resource, self._namespace, label_selector=self._selector)
        version = answer["metadata"]["resourceVersion"]
        rewound = int(version) < self._newest
        if rewound:
            log.warning(
                "the server's version of %s went back from %d to %s: dropping all that was known",
                self._resource.plural,
                self._newest,
                version,
            )
        # `items: null` is what an API server written in Go says for an empty list of some kinds.
        self._store.replace(answer.get("items") or (), version, namespace=self._namespace, rewound=rewound)
        self._version, self._newest = version, int(version)
        self._touch()
        self.synced.set()

    def _take(self, event: WatchEvent) -> None:
        self._touch()
        if event.type in ("ADDED", "MODIFIED"):
            self._store.upsert(event.object)
        elif event.type == "DELETED":
            self._store.remove(event.object)
        elif event.type != "BOOKMARK":
            log.warning("watch of %s sent an event of unknown type %r", self._resource.plural, event.type)
            return
        self._version = event.object["metadata"]["resourceVersion"]
        self._newest = max(self._newest, int(self._version))

    def _touch(self) -> None:
        self.last_event_monotonic = self._clock.monotonic()


class _ShortWatch(Exception):
    """The server closed a watch at once, with nothing in it."""


def _reason(error: ApiError) -> str:
    if error.status == 410:
        return "expired"
    if error.reason == "Inactive":
        return "inactive"
    return f"error-{error.status}"
