"""Posts events.k8s.io/v1 Events, from one task, so that no decision ever waits for a post.

An Event that says the same as one of the last six minutes becomes a count in that one's `series`, as in
client-go (tools/events/event_broadcaster.go); here the count of many is also written only once if posting is
slow.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import unicodedata
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from trainyard_api.contract import OPERATOR_NAME
from trainyard_operator.clock import Clock, SystemClock
from trainyard_operator.kube.api import EVENTS, Api, ApiError, Object
from trainyard_operator.kube.times import micro_time

MAX_NOTE = 1024
"""Bytes of UTF-8, as the API server counts them (apis/core/validation/events.go, NoteLengthLimit)."""
MAX_INSTANCE = 128
SERIES_SECONDS = 360.0
MAX_SERIES = 4096
"""Series to remember. A forgotten one costs an Event more."""
TRIES = 3
RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Regarding:
    """The object that an Event is about."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str

    @classmethod
    def of(cls, obj: Object) -> Regarding:
        """From an object that carries apiVersion and kind (items of a list do not)."""
        meta = obj["metadata"]
        return cls(obj["apiVersion"], obj["kind"], meta.get("namespace", ""), meta["name"], meta["uid"])


@dataclass(slots=True)
class _Series:
    regarding: Regarding
    body: Object
    last: float
    """When it was last said, Unix seconds."""
    touched: float
    """The same by the monotonic clock."""
    count: int = 1
    posted: int = 0
    """The count that the API server has; 0 before the first post."""
    queued: bool = False


class Recorder:
    """`event` may be called at any time and returns at once; `run` posts."""

    def __init__(
        self,
        api: Api,
        instance: str,
        *,
        clock: Clock | None = None,
        max_queue: int = 1000,
        rng: random.Random | None = None,
    ) -> None:
        self._api = api
        self._instance = instance[:MAX_INSTANCE]
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._max_queue = max_queue
        self._queue: deque[_Series] = deque()
        self._series: dict[tuple[str, ...], _Series] = {}
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.counts: Counter[str] = Counter()
        """posted, aggregated (into a series), dropped (the queue was full), failed (the API refused it)."""

    def event(
        self,
        regarding: Regarding,
        reason: str,
        note: str,
        *,
        warning: bool = False,
        action: str = "Reconcile",
    ) -> None:
        """Queues one Event, with `note` cut and cleaned. It is dropped, and counted, when too many wait."""
        note, kind, now = clean(note), "Warning" if warning else "Normal", self._clock.time()
        key = (regarding.uid, reason, note, kind, action)
        series = self._series.pop(key, None)
        if series is not None and self._clock.monotonic() - series.touched >= SERIES_SECONDS:
            series = None
        known = series is not None
        if series is None:
            series = _Series(regarding, self._body(regarding, reason, note, kind, action, now), now, 0.0, 0)
        if not series.queued and len(self._queue) >= self._max_queue:
            self.counts["dropped"] += 1
            if known:
                self._series[key] = series
            return
        series.count += 1
        series.last, series.touched = now, self._clock.monotonic()
        self._series[key] = series  # at the end: the order is that of the last use
        if len(self._series) > MAX_SERIES:
            del self._series[next(iter(self._series))]
        if known:
            self.counts["aggregated"] += 1
        if not series.queued:
            series.queued = True
            self._queue.append(series)
            self._idle.clear()
            self._work.set()

    async def run(self) -> None:
        """Posts until it is cancelled; what the API refuses is logged and counted, never raised."""
        while True:
            if not self._queue:
                self._idle.set()
                self._work.clear()
                await self._work.wait()
                continue
            series = self._queue.popleft()
            series.queued = False
            try:
                await self._post(series)
            except ApiError as error:
                self.counts["failed"] += 1
                what = series.regarding
                log.warning("an Event about %s/%s was not posted: %s", what.namespace, what.name, error)

    async def flush(self, seconds: float) -> bool:
        """Waits at most `seconds` until all is posted; false, and a log line, if some was not."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d Events were not posted within %.1f s", len(self._queue) + 1, seconds)
            return False
        return True

    # ---- inside -------------------------------------------------------------------------------------

    def _body(  # noqa: PLR0917 - the fields of one Event
        self, regarding: Regarding, reason: str, note: str, kind: str, action: str, now: float
    ) -> Object:
        stamp = micro_time(now)
        namespace = regarding.namespace or "default"
        digest = hashlib.sha256("\0".join((regarding.uid, reason, note, kind, action, stamp)).encode())
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                # The same on each try, so that a post whose answer was lost is not made twice.
                "name": f"{regarding.name[:230].rstrip('.-')}.{digest.hexdigest()[:16]}",
                "namespace": namespace,
            },
            "eventTime": stamp,
            "reportingController": OPERATOR_NAME,
            "reportingInstance": self._instance,
            "type": kind,
            "reason": reason,
            "action": action,
            "note": note,
            "regarding": {
                "apiVersion": regarding.api_version,
                "kind": regarding.kind,
                "namespace": regarding.namespace,
                "name": regarding.name,
                "uid": regarding.uid,
            },
        }

    async def _post(self, series: _Series) -> None:
        count = series.count
        if series.posted:
            if await self._patch(series, count):
                return
            # Events live for an hour, and people delete them: begin a new one.
            series.body = self._renamed(series)
        body = series.body if count == 1 else {**series.body, "series": _state(series, count)}
        try:
            await self._try(lambda: self._api.create(EVENTS, series.body["metadata"]["namespace"], body))
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        series.posted = count
        self.counts["posted"] += 1

    async def _patch(self, series: _Series, count: int) -> bool:
        meta = series.body["metadata"]
        patch = {"series": _state(series, count)}
        try:
            await self._try(lambda: self._api.merge_patch(EVENTS, meta["namespace"], meta["name"], patch))
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        series.posted = count
        return True

    def _renamed(self, series: _Series) -> Object:
        old = series.body
        parts = (old["reason"], old["note"], old["type"], old["action"])
        return self._body(series.regarding, *parts, series.last)

    async def _try(self, call: Any) -> None:
        """Up to TRIES times while the server has no time for us."""
        for number in range(1, TRIES + 1):
            try:
                await call()
            except ApiError as error:
                if number == TRIES or not (error.status in (0, 429) or error.status >= 500):
                    raise
                asked = error.retry_after or RETRY_SECONDS * self._rng.uniform(0.5, 1)
                await self._clock.sleep(min(asked, MAX_RETRY_SECONDS))
            else:
                return


def _state(series: _Series, count: int) -> Object:
    return {"count": count, "lastObservedTime": micro_time(series.last)}


def clean(note: str) -> str:
    """`note` as one line of text without control or direction characters, of at most MAX_NOTE bytes.

    Notes carry what user code printed, and end in people's terminals.
    """
    kept = "".join(c for c in note if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    kept = " ".join(kept.split())  # after it: what was taken out may have stood between two spaces
    data = kept.encode()
    if len(data) <= MAX_NOTE:
        return kept
    return data[: MAX_NOTE - 3].decode(errors="ignore") + "..."
