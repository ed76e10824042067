"""Executes a plan, in the order of docs/architecture.md 1.4: status, deletes, creates, directives, Events. A change
of the finalizers is a plan of its own.

The status comes first and is guarded by resourceVersion: a plan that was made from an old view fails there,
before it did anything. Whatever comes after can be done twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from trainyard_api.contract import API_VERSION, KIND
from trainyard_api.protocol import Directive
from trainyard_api.v1alpha1 import Status, TrainingRun
from trainyard_operator.kube.api import PODS, RUNS, Api, ApiError, Object
from trainyard_operator.kube.recorder import Regarding
from trainyard_operator.observe import controlled_by
from trainyard_operator.plan.model import CreatePod, DeletePod, Plan

PARALLEL = 50
"""Requests under way for one run at a time (as many as JobSet's controller)."""
GONE = (404, 409)
"""Answers to a DELETE with a UID precondition that mean: that object is not there any more."""
NAMESPACE_ENDS = "NamespaceTerminating"
"""Cause of the refusal of anything new in a namespace that is being deleted (admission plugin NamespaceLifecycle)."""

T = TypeVar("T")


class DirectiveSink(Protocol):
    """Where agents get their directives from."""

    def publish(self, run_uid: str, directives: Mapping[str, Directive]) -> None:
        """Replaces all directives of the run (by pod UID)."""
        ...


class EventSink(Protocol):
    """Where Events go. Returns at once and never fails."""

    def event(
        self,
        regarding: Regarding,
        reason: str,
        note: str,
        *,
        warning: bool = False,
        action: str = "Reconcile",
    ) -> None: ...


class Cache(Protocol):
    """What the operator knows of one kind; it takes in the answers to our writes."""

    def upsert(self, obj: Object) -> bool: ...

    def mark_deleting(self, uid: str) -> None: ...


class Conflict(Exception):
    """The run has changed since it was observed. Nothing of the plan was done."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a plan."""

    wrote_status: bool = False
    created: frozenset[str] = frozenset()
    """Names of pods that exist now and are the run's."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Pods that the API server will not take as they are, with its words. Others may be tried again."""
    hopeless: frozenset[str] = frozenset()
    """Those of them that it will never take, because the namespace is being deleted."""


@dataclass(frozen=True, slots=True)
class Applier:
    """Executes plans."""

    api: Api
    runs: Cache
    pods: Cache
    directives: DirectiveSink
    events: EventSink

    async def apply(self, run: TrainingRun, plan: Plan) -> Applied:
        """Raises Conflict, or the first ApiError that trying again may cure, after all else was done."""
        if plan.status is not None:
            await self._write_status(run, plan.status)
        if plan.finalizers is not None:
            await self._write_finalizers(run, plan.finalizers)
        problems: list[ApiError] = []
        await self._delete_pods(run, plan.delete_pods, problems)
        created, refused = await self._create_pods(run, plan.create_pods, problems)
        if plan.directives is not None:
            self.directives.publish(run.uid, plan.directives)
        for note in plan.events:
            self.events.event(
                regarding(run), note.reason, note.message, warning=note.warning, action=note.action
            )
        if plan.delete_run:
            await self._delete_run(run)
        if problems:
            raise problems[0]
        hopeless = frozenset(name for name, refusal in refused.items() if refusal.hopeless)
        told = {name: str(refusal) for name, refusal in refused.items()}
        return Applied(plan.status is not None, frozenset(created), told, hopeless)

    async def _write_status(self, run: TrainingRun, status: Status) -> None:
        body = {
            "metadata": {"resourceVersion": run.resource_version},
            "status": merge_diff(run.status.to_json(), status.to_json()),
        }
        try:
            answer = await self.api.merge_patch(RUNS, run.namespace, run.name, body, subresource="status")
        except ApiError as error:
            if error.status in (404, 409):
                raise Conflict(error.message) from error
            raise
        self.runs.upsert(answer)

    async def _write_finalizers(self, run: TrainingRun, finalizers: tuple[str, ...]) -> None:
        """The one write outside the status. Guarded by resourceVersion, as a merge patch replaces the whole list."""
        body = {"metadata": {"resourceVersion": run.resource_version, "finalizers": list(finalizers)}}
        try:
            answer = await self.api.merge_patch(RUNS, run.namespace, run.name, body)
        except ApiError as error:
            if error.status in (404, 409):
                raise Conflict(error.message) from error
            raise
        self.runs.upsert(
            answer
        )  # without effect for the last answer before the run is gone: its version is old

    async def _delete_pods(
        self, run: TrainingRun, pods: Iterable[DeletePod], problems: list[ApiError]
    ) -> None:
        async def delete(pod: DeletePod) -> None:
            try:
                await self.api.delete(
                    PODS, run.namespace, pod.name, uid=pod.uid, grace_seconds=pod.grace_seconds
                )
            except ApiError as error:
                if error.status not in GONE:
                    problems.append(error)
                return
            self.pods.mark_deleting(pod.uid)

        await _bounded(delete, pods)

    async def _create_pods(
        self, run: TrainingRun, pods: Iterable[CreatePod], problems: list[ApiError]
    ) -> tuple[set[str], dict[str, _Refused]]:
        created: set[str] = set()
        refused: dict[str, _Refused] = {}

        async def create(pod: CreatePod) -> None:
            try:
                obj = await self._create_or_find(run, pod)
            except _Refused as refusal:
                refused[pod.name] = refusal
            except ApiError as error:
                problems.append(error)
            else:
                self.pods.upsert(obj)
                created.add(pod.name)

        await _bounded(create, pods)
        return created, refused

    async def _create_or_find(self, run: TrainingRun, pod: CreatePod) -> Object:
        """The pod of that name, if it is the run's. A taken name is looked into, never assumed to be ours."""
        try:
            return await self.api.create(PODS, run.namespace, pod.body)
        except ApiError as error:
            if error.reason == "AlreadyExists":
                found = await self.api.get(PODS, run.namespace, pod.name)
                if controlled_by(found, run.uid):
                    return found
                message = f'a pod named "{pod.name}" exists and is not of this run; delete or rename it'
                raise _Refused(message) from error
            if error.status in (400, 403, 404, 422):
                raise _Refused(error.message, hopeless=NAMESPACE_ENDS in error.causes) from error
            raise

    async def _delete_run(self, run: TrainingRun) -> None:
        try:
            await self.api.delete(RUNS, run.namespace, run.name, uid=run.uid, propagation="Background")
        except ApiError as error:
            if error.status not in GONE:
                raise
            return
        self.runs.mark_deleting(run.uid)


class _Refused(Exception):
    """Trying the same again at once is of no use; if `hopeless`, it never is."""

    def __init__(self, message: str, *, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


def regarding(run: TrainingRun) -> Regarding:
    """The run as the subject of an Event."""
    return Regarding(API_VERSION, KIND, run.namespace, run.name, run.uid)


def merge_diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> Object:
    """The JSON merge patch (RFC 7396) that makes `new` of `old`: only what changed; null for what went.

    Keys that are in neither (of a newer version of the API) are not touched.
    """
    patch: Object = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            if changes := merge_diff(before, value):
                patch[key] = changes
        elif key not in old or before != value:
            patch[key] = value
    return patch


async def _bounded(call: Callable[[T], Awaitable[None]], items: Iterable[T]) -> None:
    """Calls for all items, PARALLEL at a time."""
    gate = asyncio.Semaphore(PARALLEL)

    async def one(item: T) -> None:
        async with gate:
            await call(item)

    async with asyncio.TaskGroup() as group:
        for item in items:
            group.create_task(one(item))
