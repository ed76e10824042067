"""kopf as the shell around our reconciler: it logs in, watches TrainingRuns and rings the doorbell.

Why only the doorbell. kopf replays objects after a re-list as events of type None and never tells which
vanished while it was disconnected (`kopf._core.reactor.processing`), and its events of one object may come
after newer ones of our own watch. So the truth about runs is a reflector of ours (`kube/reflector.py`), and
an event of kopf says no more than "look at this run". A second, independent watch also means that a stalled
one delays nothing.

Why a thread of its own. When `kopf.operator()` ends, for whatever reason, it cancels *every* task of its loop
that is younger than itself (`kopf._core.reactor.running.run_tasks`: "the loop is not fully ours!"), waits 5 s
for them, closes the session it was given, and it takes over the loop's signal handlers. kopf 1.45 ends when a
watch fails for good (an API server that is away for longer than its few retries). In a loop of its own all
this harms nobody: it is started again after a back-off, while our reflectors, the agents' connections and
reconciles in progress go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, cast

import aiohttp
import kopf
import uvloop

from trainyard_api.contract import GROUP, PLURAL, VERSION

log = logging.getLogger(__name__)

FIRST_BACKOFF = 1.0
LAST_BACKOFF = 60.0
STABLE_SECONDS = 120.0
"""A kopf that ran for so long starts again with the first back-off."""
JOIN_SECONDS = 1.0

Connect = Callable[[], Awaitable[tuple[str, aiohttp.ClientSession]]]
"""Opens a session to the API server in the current loop: its URL, and the session. kopf closes it."""


class NoDiffBase(kopf.DiffBaseStorage):
    """Nothing is diffed: no deep copies for each event, no last-handled annotation."""

    def build(self, *, body: kopf.Body, extra_fields: Iterable[Any] | None = None) -> kopf.BodyEssence:
        return cast(kopf.BodyEssence, {})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return cast(kopf.BodyEssence, {})

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Keeps nothing."""


class NoProgress(kopf.ProgressStorage):
    """No handler has progress to keep."""

    def fetch(self, *, key: Any, body: kopf.Body) -> None:
        return None

    def store(self, *, key: Any, record: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        """Keeps nothing."""

    def purge(self, *, key: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        """There is nothing to purge."""

    def touch(self, *, body: kopf.Body, patch: kopf.Patch, value: str | None) -> None:
        """Touches nothing."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def kopf_settings() -> kopf.OperatorSettings:
    """What makes kopf a host that never writes to the cluster; times are seconds."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.persistence.finalizer = f"{GROUP}/kopf"
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.persistence.progress_storage = NoProgress()
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 70
    settings.watching.reconnect_backoff = 1.0
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = (0.2, 1, 3)
    settings.networking.enforce_retry_after = True
    settings.queueing.idle_timeout = 1.0
    settings.process.ultimate_exiting_timeout = None  # it would SIGKILL the whole process, not its thread
    return settings


class KopfHost:
    """Runs kopf in a thread, for ever. `ring(namespace, name)` is called in the loop that called `start`."""

    def __init__(
        self, *, connect: Connect, namespaces: Collection[str], ring: Callable[[str, str], None]
    ) -> None:
        self._connect = connect
        self._namespaces = tuple(namespaces)
        self._ring = ring
        self._home: asyncio.AbstractEventLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._task: asyncio.Task[Any] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="kopf", daemon=True)
        self.starts = 0
        """How often kopf was started; 1 unless it failed."""

    def start(self) -> None:
        """Starts the thread. Call it in the loop that `ring` belongs to."""
        self._home = asyncio.get_running_loop()
        self._thread.start()

    def alive(self) -> str:
        """A health check: empty, or what is wrong."""
        expected = self._thread.ident is not None and not self._stopping.is_set()
        return "the thread of kopf has ended" if expected and not self._thread.is_alive() else ""

    async def stop(self) -> None:
        """Asks kopf to end, then cancels it; waits JOIN_SECONDS each time (the thread cannot hold the process)."""
        self._stopping.set()
        if self._thread.ident is None:
            return
        for end in (self._ask_to_end, self._cancel):
            with contextlib.suppress(RuntimeError):  # its loop is closed: kopf has ended
                end()
            await asyncio.to_thread(self._thread.join, JOIN_SECONDS)
            if not self._thread.is_alive():
                return
        log.warning("kopf did not stop within %.0f s", 2 * JOIN_SECONDS)

    def _ask_to_end(self) -> None:
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    def _cancel(self) -> None:
        """kopf waits 5 s for tasks that it calls hung; it does not when it is cancelled."""
        if self._loop is not None and self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)

    # ---- in the thread ------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._supervise())
        except asyncio.CancelledError:
            log.info("kopf was cancelled")
        except Exception:
            log.exception("the thread of kopf failed")

    async def _supervise(self) -> None:
        self._task, self._stop = asyncio.current_task(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        backoff = FIRST_BACKOFF
        while not self._stopping.is_set():
            self.starts += 1
            began = self._loop.time()
            try:
                await self._operate(self._stop)
                why: object = "it returned"
            except Exception as error:
                why = error
            if self._stopping.is_set():
                return
            if self._loop.time() - began > STABLE_SECONDS:
                backoff = FIRST_BACKOFF
            delay = backoff * random.uniform(0.5, 1)  # noqa: S311 - jitter
            backoff = min(backoff * 2, LAST_BACKOFF)
            log.warning("kopf ended (%s); starting it again in %.1f s", why, delay)
            try:
                async with asyncio.timeout(delay):
                    await self._stop.wait()
            except TimeoutError:
                continue

    async def _operate(self, stop: asyncio.Event) -> None:
        """Runs kopf once, until `stop` or its own end. Raises what ended it."""
        everywhere = not self._namespaces
        ending = asyncio.Event()
        link = asyncio.create_task(_pass_on(stop, ending), name="stop of kopf")
        refused: list[Exception] = []
        try:
            await kopf.operator(
                registry=self._registry(ending, refused),
                settings=kopf_settings(),
                standalone=True,
                clusterwide=everywhere,
                namespaces=() if everywhere else self._namespaces,
                stop_flag=ending,
            )
        finally:
            link.cancel()
            if refused:
                raise refused[0]

    def _registry(self, ending: asyncio.Event, refused: list[Exception]) -> kopf.OperatorRegistry:
        """Our own registry: no global decorators, no handlers of anybody else in the process."""
        registry = kopf.OperatorRegistry()

        async def login(**_: Any) -> kopf.AiohttpSession:
            try:
                server, session = await self._connect()
            except Exception as error:
                # kopf would try again in 60 s; and if it gave up, nobody in it would notice that its task for
                # credentials has ended (1.45.2 watches its root tasks only): everything would wait for ever.
                refused.append(error)
                ending.set()
                raise kopf.PermanentError(f"cannot log in: {error}") from None
            return kopf.AiohttpSession(server=server, aiohttp_session=session)

        async def doorbell(namespace: str | None, name: str | None, **_: Any) -> None:
            if self._home is not None and namespace and name:
                with contextlib.suppress(RuntimeError):  # that loop is closed: the process ends
                    self._home.call_soon_threadsafe(self._ring, namespace, name)

        kopf.on.login(registry=registry)(cast(Any, login))
        kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(cast(Any, doorbell))
        return registry


async def _pass_on(first: asyncio.Event, second: asyncio.Event) -> None:
    await first.wait()
    second.set()
