"""One round for one run: observe, plan, apply, and when to come again. The work queue calls it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from trainyard_api.contract import Reason
from trainyard_operator.apply import Applied, Applier, Cache, Conflict, DirectiveSink, EventSink, regarding
from trainyard_operator.clock import Clock
from trainyard_operator.kube.api import RUNS, Api, ApiError, Object
from trainyard_operator.kube.recorder import Regarding
from trainyard_operator.observe import observe
from trainyard_operator.plan import Plan, PlanSettings, plan
from trainyard_operator.plan.cleanup_pod import cleanup_number
from trainyard_operator.plan.model import Member, Observed, Refusal
from trainyard_operator.plan.names import parse_pod_name
from trainyard_operator.podevents import PodEvents

Key = tuple[str, str]
"""(namespace, name)."""

CRASH_SECONDS = 10.0
"""Pause after a bug of ours: the run is looked at again, the worker lives on."""
GONE_SECONDS = 1.0
"""Pause when the run is gone from the API server but the watch has not said so yet."""
FIRST_RETRY = 1.0
LONGEST_RETRY = 60.0
"""Seconds between two tries to create a pod that the API server refuses; doubling in between."""

log = logging.getLogger(__name__)


class RunStore(Cache, Protocol):
    """The runs that are known."""

    def get(self, namespace: str, name: str) -> Object | None: ...


class PodStore(Cache, Protocol):
    """The pods that are known."""

    def owned_by(self, uid: str) -> list[Object]: ...


class Coordinator(DirectiveSink, Protocol):
    """The agents' side of the operator."""

    def members(self, run_uid: str) -> Mapping[str, Member]: ...

    def forget(self, run_uid: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Round:
    """What a round came to, for metrics."""

    key: Key
    seconds: float
    outcome: str
    """done, conflict, gone, invalid, api_error or crash."""
    observed: Observed | None = None
    plan: Plan | None = None
    applied: Applied | None = None


@dataclass(slots=True)
class _Memory:
    """What is kept of a run between rounds. Losing it costs a write or a try more, nothing else."""

    uid: str
    status_written: float = 0.0
    refusals: dict[str, Refusal] = field(default_factory=dict)
    setup_troubles: dict[str, str] = field(default_factory=dict)
    """By pod UID."""
    tries: int = 0
    complained_of: str = ""
    """resourceVersion of the run that could not be read."""


class Reconciler:
    """Call it with a key; it returns in how many seconds to call again, or None.

    It raises ApiError (the queue backs off) and nothing else. Rounds of one key must not overlap.
    """

    def __init__(
        self,
        *,
        api: Api,
        runs: RunStore,
        pods: PodStore,
        coordinator: Coordinator,
        events: EventSink,
        settings: PlanSettings,
        clock: Clock,
        listening_since: Callable[[], float],
        on_round: Callable[[Round], None] | None = None,
    ) -> None:
        self._api = api
        self._runs = runs
        self._pods = pods
        self._coordinator = coordinator
        self._events = events
        self._settings = settings
        self._clock = clock
        self._listening_since = listening_since
        self._on_round = on_round
        self._pod_events = PodEvents(api, clock)
        self._applier = Applier(api, runs, pods, coordinator, events)
        self._memories: dict[Key, _Memory] = {}

    async def __call__(self, key: Key) -> float | None:
        begin = self._clock.monotonic()
        try:
            again, round_ = await self._round(key)
        except ApiError:
            self._report(key, begin, Round(key, 0.0, "api_error"))
            raise
        except Exception:  # a bug in one run's round must not cost the others their worker
            log.exception("round of run %s/%s failed; looking again in %.0f s", *key, CRASH_SECONDS)
            self._report(key, begin, Round(key, 0.0, "crash"))
            return CRASH_SECONDS
        self._report(key, begin, round_)
        return again

    async def _round(self, key: Key) -> tuple[float | None, Round]:
        obj = self._runs.get(*key)
        memory = self._remember(key, obj)
        if obj is None or memory is None:
            return None, Round(key, 0.0, "gone")
        memory.setup_troubles = await self._pod_events.look(
            self._pods.owned_by(memory.uid), memory.setup_troubles
        )
        try:
            observed = self._observe(obj, memory)
        except ValueError as error:
            self._complain(key, obj, memory, error)
            return None, Round(key, 0.0, "invalid")
        decided = plan(observed, self._settings)
        try:
            applied = await self._applier.apply(observed.run, decided)
        except Conflict:
            pause = 0.0 if await self._refresh(key) else GONE_SECONDS
            return pause, Round(key, 0.0, "conflict", observed, decided)
        for note in decided.events:  # in a namespace that is being deleted no Event can be posted
            if note.reason == Reason.CHECKPOINTS_LEFT_BEHIND:
                log.warning("%s", note.message)
        if applied.wrote_status:
            memory.status_written = self._clock.time()
        news = self._take_in(memory, applied)
        again = 0.0 if news else decided.requeue_after
        return again, Round(key, 0.0, "done", observed, decided, applied)

    def _observe(self, obj: Object, memory: _Memory) -> Observed:
        pods = self._pods.owned_by(memory.uid)
        existing = {pod["metadata"]["name"] for pod in pods}
        run_name = str(obj["metadata"].get("name"))
        status = obj.get("status")
        attempt = status.get("attempt") if isinstance(status, dict) else None
        memory.refusals = {
            name: refusal
            for name, refusal in memory.refusals.items()
            if name not in existing
            and (cleanup_number(run_name, name) or (parse_pod_name(name) or (0, 0))[1] == attempt)
        }
        return observe(
            obj,
            pods,
            self._coordinator.members(memory.uid),
            now=self._clock.time(),
            listening_since=self._listening_since(),
            refusals=memory.refusals.values(),
            status_written=memory.status_written,
            setup_troubles=memory.setup_troubles,
        )

    def _take_in(self, memory: _Memory, applied: Applied) -> bool:
        """Remembers what was refused; true if that is news, which the next round puts into the status."""
        for name in applied.created:
            memory.refusals.pop(name, None)
        if not applied.refused:
            if applied.created:
                memory.tries = 0
            return False
        pause = min(FIRST_RETRY * 2 ** min(memory.tries, 16), LONGEST_RETRY)
        memory.tries += 1
        retry_at = self._clock.time() + pause
        for name, message in applied.refused.items():
            hopeless = name in applied.hopeless
            memory.refusals[name] = Refusal(pod=name, message=message, retry_at=retry_at, hopeless=hopeless)
        return True

    def _remember(self, key: Key, obj: Object | None) -> _Memory | None:
        """The memory of the run that has this name now; one of an earlier run of the name is dropped."""
        uid = obj["metadata"]["uid"] if obj is not None else ""
        known = self._memories.get(key)
        if known is not None and known.uid != uid:
            self._coordinator.forget(known.uid)
            del self._memories[key]
            known = None
        if obj is None:
            return None
        if known is None:
            known = self._memories[key] = _Memory(uid)
        return known

    async def _refresh(self, key: Key) -> bool:
        """After a conflict the cache is behind: the newest state comes from the API server itself.

        False if the run is gone.
        """
        try:
            self._runs.upsert(await self._api.get(RUNS, *key))
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    def _complain(self, key: Key, obj: Object, memory: _Memory, error: ValueError) -> None:
        """Once for each state of the object, to the log and to its owner."""
        version = obj["metadata"].get("resourceVersion", "")
        if memory.complained_of == version:
            return
        memory.complained_of = version
        log.warning("run %s/%s cannot be read and is left alone: %s", *key, error)
        subject = Regarding("trainyard.dev/v1alpha1", "TrainingRun", *key, memory.uid)
        self._events.event(
            subject, str(Reason.CONFIGURATION), f"The object cannot be read: {error}", warning=True
        )

    def _report(self, key: Key, begin: float, round_: Round) -> None:
        if self._on_round is None:
            return
        seconds = self._clock.monotonic() - begin
        self._on_round(Round(key, seconds, round_.outcome, round_.observed, round_.plan, round_.applied))


__all__ = ["Coordinator", "PodStore", "Reconciler", "Round", "RunStore", "regarding"]
