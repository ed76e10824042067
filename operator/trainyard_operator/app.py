"""The composition root: the one file that knows every other part, and starts and stops them in order.

Crash-only: a part that ends by itself ends the process with a message, and the kubelet starts it anew; that
takes about a second and is safe at any point, because all that matters is in the API server. Only kopf is
started again in place (see kopf_host.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import ssl
import time
from collections import Counter
from typing import Any

import aiohttp
import uvloop

from trainyard_api.contract import LABEL_MANAGED_BY, MANAGED_BY
from trainyard_operator.clock import SystemClock
from trainyard_operator.collectors import Internals, InternalsCollector, RunsCollector, Watched, count_changes
from trainyard_operator.commits import CommitMeter
from trainyard_operator.coordinator.fleet import CachedFleet
from trainyard_operator.coordinator.registry import Registry
from trainyard_operator.coordinator.server import Coordinator, CoordinatorServer
from trainyard_operator.coordinator.tls import ServerTls
from trainyard_operator.coordinator.tokens import TokenReviewer
from trainyard_operator.crd import NoCrdError, check_crd
from trainyard_operator.kopf_host import KopfHost
from trainyard_operator.kube import credentials
from trainyard_operator.kube.api import PODS, RUNS, Object
from trainyard_operator.kube.client import HttpApi
from trainyard_operator.kube.lease import LeaderElector, Timing
from trainyard_operator.kube.recorder import Recorder
from trainyard_operator.kube.reflector import Reflector
from trainyard_operator.kube.session import Connection, connect
from trainyard_operator.kube.store import Key, Store, controller_uid
from trainyard_operator.log import about
from trainyard_operator.metrics import CONTROLLER, Metrics
from trainyard_operator.parts import Parts
from trainyard_operator.reconcile import Reconciler, Round
from trainyard_operator.settings import Settings
from trainyard_operator.web import Checks, LoopMonitor, WebServer, application, watches_live, workers_live
from trainyard_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

OK, CRASHED, MISCONFIGURED, NO_CRD = 0, 1, 2, 3
"""Exit codes."""
DRAIN_SECONDS = 3.0
"""How long reconciles in progress may take at the end."""
FLUSH_SECONDS = 1.0
SWEEP_SECONDS = 60.0
RESYNC_JITTER = 0.2
ROUND_RESULTS = {"api_error": "error", "crash": "error", "conflict": "requeue"}
"""Outcomes of a round in the words of controller-runtime; all others are "success"."""


class App:
    """One operator process. `run` returns the exit code."""

    def __init__(self, settings: Settings) -> None:
        """Reads all files that the settings name. Raises ValueError or OSError. Needs a running event loop."""
        self._settings = settings
        self._clock = SystemClock()
        self._stop = asyncio.Event()
        self._stopping = False
        self._listening_since = 0.0
        self._api_answered = float("-inf")
        self.metrics = Metrics()
        try:
            self._tls = ServerTls(settings.coordinator_cert, settings.coordinator_key)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(
                f"TRAINYARD_COORDINATOR_CERT, TRAINYARD_COORDINATOR_KEY: cannot use "
                f"{settings.coordinator_cert} and {settings.coordinator_key}: {error}"
            ) from None
        plan_settings = settings.plan_settings()
        self._connection = connect(credentials.load(settings.kubeconfig), observer=self._observe)
        self._api = HttpApi(self._connection)
        self._runs, self._pods = Store(self._run_changed), Store(self._pod_changed)
        self._reflectors = self._make_reflectors()
        self._queue: WorkQueue[Key] = WorkQueue(clock=self._clock, metrics=self.metrics.queue())
        self._recorder = Recorder(self._api, settings.identity, clock=self._clock)
        self._elector = LeaderElector(
            self._api,
            settings.lease_namespace,
            settings.lease_name,
            settings.identity,
            _die,
            timing=_timing(settings.lease_duration),
            clock=self._clock,
        )
        self._commits = CommitMeter(self.metrics, self._committed)
        self._registry = Registry(
            on_change=self._agents_changed, clock=self._clock, on_commit=self._commits.heard
        )
        self._reconciler = Reconciler(
            api=self._api,
            runs=self._runs,
            pods=self._pods,
            coordinator=self._registry,
            events=self._recorder,
            settings=plan_settings,
            clock=self._clock,
            listening_since=lambda: self._loop_monitor.awake_since(self._listening_since),
            on_round=self._count_round,
        )
        self._coordinator = CoordinatorServer(
            Coordinator(
                registry=self._registry,
                tokens=TokenReviewer(
                    self._api,
                    clock=self._clock,
                    on_review=lambda result: self.metrics.token_reviews.labels(result).inc(),
                ),
                fleet=CachedFleet(runs=self._runs, pods=self._pods, serving=self._serving),
                clock=self._clock,
                on_answer=lambda status: self.metrics.beats.labels(str(status)).inc(),
            ),
            self._registry,
            self._tls.context,
        )
        self._kopf = KopfHost(
            connect=self._connect_kopf,
            namespaces=settings.namespaces,
            ring=lambda ns, name: self._ring((ns, name)),
        )
        self._loop_monitor = LoopMonitor(self.metrics.loop_lag.observe, self._clock)
        self._web = WebServer(application(self._checks(), self.metrics.registry))
        self._register_collectors()
        self._parts = Parts()
        self._work: asyncio.Task[Any] | None = None
        self._election: asyncio.Task[Any] | None = None

    # ---- the life of the process ----------------------------------------------------------------------

    async def run(self) -> int:
        """Runs until SIGTERM or SIGINT (exit code 0), or until a part fails (1), or without CRD (3)."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        main = asyncio.create_task(self._live(), name="main")
        asked = asyncio.create_task(self._stop.wait(), name="signal")
        try:
            await asyncio.wait((main, asked), return_when=asyncio.FIRST_COMPLETED)
            if not main.done():
                log.info("asked to stop")
                return OK
            return _told(main.exception())
        finally:
            began = time.monotonic()
            await self._shut_down(main, asked)
            log.info("stopped in %.1f s", time.monotonic() - began)

    async def _live(self) -> None:
        """Starts all parts in their order and waits; raises when one of them ends."""
        settings = self._settings
        web_port = await self._web.start(settings.web_host, settings.web_port)
        port = await self._coordinator.start(settings.coordinator_host, settings.coordinator_port)
        log.info("probes and metrics on port %d, coordinator on port %d", web_port, port)
        self._parts.spawn("event loop monitor", self._loop_monitor.run())
        self._parts.spawn("certificate reload", self._tls.follow())
        await self._parts.guard(check_crd(self._api, self._clock))
        for name, reflectors in self._reflectors.items():
            for reflector in reflectors:
                self._parts.spawn(f"watch of {name}", reflector.run())
        await self._parts.guard(self._sync())
        self._election = self._parts.spawn("leader election", self._elector.run())
        await self._parts.guard(self._elector.leading.wait())
        self._listening_since = self._clock.time()
        self._parts.spawn("events", self._recorder.run())
        self._parts.spawn("resync", self._resync())
        self._parts.spawn("sweep", self._sweep())
        for run in self._runs:
            self._ring((run["metadata"]["namespace"], run["metadata"]["name"]))
        self._work = self._parts.spawn("work queue", self._queue.run(settings.workers, self._reconcile))
        self._kopf.start()
        log.info("working on %d runs with %d workers", len(self._runs), settings.workers)
        await self._parts.guard(asyncio.Event().wait())

    async def _sync(self) -> None:
        """Until every cache holds its first list. Its bound is the liveness probe."""
        waiting = [(n, r) for n, group in self._reflectors.items() for r in group]
        while True:
            missing = sorted({name for name, r in waiting if not r.synced.is_set()})
            if not missing:
                return
            done = asyncio.gather(*(r.synced.wait() for _, r in waiting))
            try:
                async with asyncio.timeout(30):
                    await done
            except TimeoutError:
                log.warning("still waiting for the first list of: %s", ", ".join(missing))

    async def _shut_down(self, *tasks: asyncio.Task[Any]) -> None:
        """Takes no new work, lets go of the lease, closes the servers. Every step is bounded."""
        self._stopping = True
        await self._drain()
        if self._work is not None:
            self._work.cancel()  # before the lease is free, nothing of ours may write any more
            await asyncio.gather(self._work, return_exceptions=True)
        if self._election is not None:
            self._election.cancel()  # gives the lease back, bounded by its own time-out
        await self._recorder.flush(FLUSH_SECONDS)
        last = (self._coordinator.stop(), self._kopf.stop(), *((self._election,) if self._election else ()))
        await asyncio.gather(*last, return_exceptions=True)
        await self._parts.end(tasks)
        await asyncio.gather(self._web.stop(), self._connection.close(), return_exceptions=True)

    async def _drain(self) -> None:
        deadline = self._clock.monotonic() + DRAIN_SECONDS
        while left := self._queue.in_flight():
            if self._clock.monotonic() > deadline:
                log.warning("stopping in the middle of %s", ", ".join("/".join(k) for k in sorted(left)))
                return
            await self._clock.sleep(0.02)

    # ---- work -----------------------------------------------------------------------------------------

    async def _reconcile(self, key: Key) -> float | None:
        if self._stopping or not self._elector.is_leading():
            return None
        with about(*key):
            return await self._reconciler(key)

    def _count_round(self, done: Round) -> None:
        self.metrics.reconciled(ROUND_RESULTS.get(done.outcome, "success"), done.seconds)

    def _ring(self, key: Key) -> None:
        """Somebody saw something about this run."""
        if self._elector.leading.is_set() and not self._stopping:
            self._queue.add(key)

    def _run_changed(self, key: Key, old: Object | None, new: Object | None) -> None:
        if new is None and old is not None:
            self._registry.forget(old["metadata"]["uid"])
            self._commits.forget(old["metadata"]["uid"])
        if new is not None and self._elector.leading.is_set():
            count_changes(self.metrics, old, new)
        self._ring(key)

    def _pod_changed(self, key: Key, old: Object | None, new: Object | None) -> None:
        owner = controller_uid(new or old or {"metadata": {}})
        if owner is not None:
            self._agents_changed(owner)

    def _agents_changed(self, run_uid: str) -> None:
        run = self._runs.by_uid(run_uid)
        if run is not None:
            self._ring((run["metadata"]["namespace"], run["metadata"]["name"]))

    def _committed(self, run_uid: str) -> int:
        """Number of the newest commit that the status has."""
        run = self._runs.by_uid(run_uid)
        checkpoint = ((run or {}).get("status") or {}).get("checkpoint") or {}
        return int(checkpoint.get("seq") or 0)

    async def _resync(self) -> None:
        """Looks at every run from time to time, for what no event told."""
        while True:
            interval = self._settings.resync_seconds
            await self._clock.sleep(interval * random.uniform(1 - RESYNC_JITTER, 1 + RESYNC_JITTER))  # noqa: S311
            for run in self._runs:
                key = (run["metadata"]["namespace"], run["metadata"]["name"])
                self._queue.add_after(key, random.uniform(0, interval * RESYNC_JITTER))  # noqa: S311

    async def _sweep(self) -> None:
        """Forgets agents and runs that no longer exist."""
        while True:
            await self._clock.sleep(SWEEP_SECONDS)
            self._registry.retain(
                {run["metadata"]["uid"] for run in self._runs}, {pod["metadata"]["uid"] for pod in self._pods}
            )

    # ---- what the parts ask of each other -------------------------------------------------------------

    def _synced(self) -> bool:
        return all(r.synced.is_set() for group in self._reflectors.values() for r in group)

    def _serving(self) -> bool:
        return self._listening_since > 0 and not self._stopping and self._elector.is_leading()

    def _observe(self, verb: str, resource: str, code: str, seconds: float) -> None:
        if code.isdigit() and int(code) < 500:
            self._api_answered = self._clock.monotonic()
        self.metrics.api_request(verb, resource, code, seconds)

    async def _connect_kopf(self) -> tuple[str, aiohttp.ClientSession]:
        """kopf lives in a loop of its own, and aiohttp's connections belong to a loop."""
        connection: Connection = connect(credentials.load(self._settings.kubeconfig))
        return connection.server, connection.session

    def _make_reflectors(self) -> dict[str, list[Reflector]]:
        spaces: tuple[str | None, ...] = self._settings.namespaces or (None,)
        selector = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
        return {
            "trainingruns": [
                Reflector(self._api, RUNS, ns, "", self._runs, clock=self._clock) for ns in spaces
            ],
            "pods": [
                Reflector(self._api, PODS, ns, selector, self._pods, clock=self._clock) for ns in spaces
            ],
        }

    def _last_heard(self) -> dict[str, float]:
        return {n: min(r.last_event_monotonic for r in group) for n, group in self._reflectors.items()}

    def _checks(self) -> Checks:
        return Checks(
            alive={
                "loop": self._loop_monitor.check,
                "watches": watches_live(self._last_heard, lambda: self._api_answered, self._clock),
                "workers": workers_live(self._queue.longest_running, self._queue.in_flight),
                "kopf": self._kopf.alive,
            },
            ready={
                "caches": lambda: "" if self._synced() else "the first lists are not read yet",
                "leader": lambda: "" if self._serving() else f"{self._elector.holder or 'nobody'} leads",
            },
        )

    def _register_collectors(self) -> None:
        metrics = self.metrics
        metrics.workers.labels(CONTROLLER).set(self._settings.workers)
        metrics.leader.set_function(lambda: float(self._elector.is_leading()))
        metrics.queue_longest.labels(CONTROLLER).set_function(self._queue.longest_running)
        metrics.registry.register(
            RunsCollector(lambda: self._runs, lambda: self._registry.connected(self._settings.agent_ttl))
        )
        metrics.registry.register(InternalsCollector(self._internals))

    def _internals(self) -> Internals:
        age = self._clock.time() - self._clock.monotonic()
        stores = {"trainingruns": self._runs, "pods": self._pods}
        return Internals(
            watched={
                name: Watched(
                    objects=len(stores[name]),
                    last_heard=age + heard,
                    restarts=sum((r.restarts for r in self._reflectors[name]), start=Counter()),
                )
                for name, heard in self._last_heard().items()
            },
            events=self._recorder.counts,
            kopf_starts=self._kopf.starts,
        )


def _timing(duration: float) -> Timing:
    """client-go's proportions: 15, 10, 2."""
    return Timing(lease_duration=duration, renew_deadline=duration * 2 / 3, retry_period=duration * 2 / 15)


def _die(why: str) -> None:
    """Called when the lease is lost: nothing of ours may write from now on, so nothing is cleaned up."""
    log.critical("the lease is lost (%s): ending at once", why)
    logging.shutdown()
    os._exit(CRASHED)


def _told(error: BaseException | None) -> int:
    """Says why the process ends; returns its exit code."""
    if isinstance(error, NoCrdError):
        log.critical("%s", error)
        return NO_CRD
    cause = error.__cause__ if error is not None else None
    log.critical("%s%s", error, f": {cause!r}" if cause else "", exc_info=cause or error)
    return CRASHED


def main(settings: Settings) -> int:
    """Runs an operator in this process. Returns its exit code."""

    async def operate() -> int:
        try:
            app = App(settings)
        except (ValueError, OSError) as error:
            log.critical("%s", error)
            return MISCONFIGURED
        return await app.run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(operate())
