"""`FakeApi`: the `Api` protocol over dicts, with the API server's rules that the operator relies on.

What it keeps of the real one: one growing resourceVersion, optimistic concurrency (409 Conflict), UID
preconditions, AlreadyExists, the status subresource (status is ignored elsewhere and the rest is ignored
there), `metadata.generation`, finalizers, graceful deletion of pods that are bound to a node, label
selectors on lists and watches, expired watches (410), and on request the garbage collector. Not kept:
schemas, admission, managedFields, field selectors. tests/fakes/api_contract.py holds the checks that both
this one and a real API server pass.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from tests.fakes.label_selectors import has_fields, matches
from tests.fakes.merge_patch import merge
from trainyard_operator.kube.api import PODS, RUNS, ApiError, Object, Resource, WatchEvent

WITH_STATUS = (RUNS, PODS)
"""Resources with a status subresource."""

CREATION_TIME = "2026-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class Call:
    """One request that was made, whether it succeeded or not."""

    verb: str
    """get, list, create, patch, replace, delete, watch."""
    resource: Resource
    namespace: str | None = None
    name: str = ""
    body: Object | None = None
    subresource: str | None = None


@dataclass(slots=True)
class _Failure:
    verb: str
    error: ApiError
    resource: Resource | None
    name: str | None
    after: bool
    times: int

    def fits(self, call: Call) -> bool:
        return (
            self.verb in ("*", call.verb)
            and self.resource in (None, call.resource)
            and self.name in (None, call.name)
        )


@dataclass(frozen=True, slots=True)
class _Change:
    version: int
    type: str
    resource: Resource
    new: Object
    old: Object | None


class FakeApi:
    """An API server in this process.

    `gc=True` deletes dependents when their last owner goes, as the garbage collector does (at once).
    """

    def __init__(self, *, gc: bool = False) -> None:
        self.gc = gc
        self.calls: list[Call] = []
        self.objects: dict[Resource, dict[tuple[str, str], Object]] = {}
        self.reactors: dict[Resource, Callable[[Object], Object]] = {}
        """Answers to `create` that come from a function instead (TokenReview)."""
        self._version = 100
        self._uids = itertools.count(1)
        self._failures: list[_Failure] = []
        self._history: list[_Change] = []
        self._oldest = 0
        self._streams: dict[int, asyncio.Queue[_Change | ApiError | None]] = {}
        self._stream_ids = itertools.count()

    # ---- what tests say -----------------------------------------------------------------------------

    def fail_next(
        self,
        verb: str,
        error: ApiError,
        *,
        resource: Resource | None = None,
        name: str | None = None,
        after: bool = False,
        times: int = 1,
    ) -> None:
        """Lets the next `times` matching calls fail; `after`: the change is made, the answer is lost."""
        self._failures.append(_Failure(verb, error, resource, name, after, times))

    def seed(self, resource: Resource, body: Object) -> Object:
        """Puts an object there, status included, and tells watchers. Not recorded as a call."""
        meta = body.get("metadata", {})
        key = (meta.get("namespace", "") if resource.namespaced else "", meta["name"])
        obj = copy.deepcopy(body)
        obj["metadata"].setdefault("uid", self._uid())
        obj["metadata"].setdefault("creationTimestamp", CREATION_TIME)
        obj["metadata"].setdefault("generation", 1)
        old = self._of(resource).get(key)
        return self._store(resource, key, obj, "MODIFIED" if old else "ADDED", old)

    def peek(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """The object as stored, without a call."""
        found = self._of(resource).get((namespace or "", name))
        return copy.deepcopy(found) if found else None

    def all(self, resource: Resource) -> Sequence[Object]:
        """All objects as stored, by namespace and name, without a call."""
        return [copy.deepcopy(o) for _, o in sorted(self._of(resource).items())]

    def verbs(self, resource: Resource | None = None) -> Sequence[str]:
        """Names of the calls so far, in order."""
        return [c.verb for c in self.calls if resource in (None, c.resource)]

    def close_watches(self, error: ApiError | None = None) -> None:
        """Ends every open watch: as the server does after its time-out, or with `error`."""
        for queue in self._streams.values():
            queue.put_nowait(error)

    def bookmark(self) -> None:
        """Sends a bookmark of the current version into every open watch."""
        for queue in self._streams.values():
            queue.put_nowait(_Change(self._version, "BOOKMARK", PODS, {}, None))

    def compact(self) -> None:
        """Forgets the history: a watch from an older version gets 410, as after etcd's compaction."""
        self._history.clear()
        self._oldest = self._version

    def finish_deletion(self, resource: Resource, namespace: str, name: str) -> None:
        """What the kubelet does when a terminating pod's containers have stopped."""
        self._remove(resource, (namespace, name))

    @property
    def watching(self) -> int:
        """Number of open watches."""
        return len(self._streams)

    # ---- the Api protocol ---------------------------------------------------------------------------

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        await self._enter(Call("get", resource, namespace, name))
        return copy.deepcopy(self._existing(resource, namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = 500,
    ) -> Object:
        await self._enter(Call("list", resource, namespace))
        items = [
            copy.deepcopy(obj)
            for (space, _), obj in sorted(self._of(resource).items())
            if namespace in (None, space) and matches(label_selector, obj) and has_fields(field_selector, obj)
        ]
        return {"metadata": {"resourceVersion": str(self._version)}, "items": items}

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        name = body.get("metadata", {}).get("name", "")
        call = Call("create", resource, namespace, name, copy.deepcopy(body))
        await self._enter(call)
        if resource in self.reactors:
            return self.reactors[resource](copy.deepcopy(body))
        obj = copy.deepcopy(body)
        meta = obj.setdefault("metadata", {})
        if not name:
            raise ApiError(422, "Invalid", "metadata.name: Required value")
        if meta.get("resourceVersion"):
            raise ApiError(500, "Unknown", "resourceVersion should not be set on objects to be created")
        if resource.namespaced and meta.setdefault("namespace", namespace) != namespace:
            raise ApiError(400, "BadRequest", "the namespace of the object does not match the request")
        key = (namespace or "", name)
        if key in self._of(resource):
            raise ApiError(409, "AlreadyExists", f'{resource.plural} "{name}" already exists')
        meta |= {"uid": self._uid(), "creationTimestamp": CREATION_TIME, "generation": 1}
        meta.pop("deletionTimestamp", None)
        if resource in WITH_STATUS:
            obj.pop("status", None)
        if resource == PODS:
            obj["status"] = {"phase": "Pending"}
        return self._leave(call, self._store(resource, key, obj, "ADDED", None))

    async def merge_patch(
        self, resource: Resource, namespace: str, name: str, body: Object, *, subresource: str | None = None
    ) -> Object:
        call = Call("patch", resource, namespace, name, copy.deepcopy(body), subresource)
        await self._enter(call)
        old = self._existing(resource, namespace, name)
        self._check_preconditions(resource, name, old, body.get("metadata", {}))
        new = merge(old, body)
        return self._leave(call, self._update(resource, (namespace, name), old, new, subresource))

    async def replace(self, resource: Resource, namespace: str, name: str, body: Object) -> Object:
        call = Call("replace", resource, namespace, name, copy.deepcopy(body))
        await self._enter(call)
        old = self._existing(resource, namespace, name)
        self._check_preconditions(resource, name, old, body.get("metadata", {}))
        return self._leave(call, self._update(resource, (namespace, name), old, copy.deepcopy(body), None))

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
        options = {"uid": uid, "grace_seconds": grace_seconds, "propagation": propagation}
        call = Call("delete", resource, namespace, name, {k: v for k, v in options.items() if v is not None})
        await self._enter(call)
        obj = self._existing(resource, namespace, name)
        self._check_preconditions(resource, name, obj, {"uid": uid} if uid else {})
        key = (namespace or "", name)
        if propagation == "Orphan":
            self._orphan(obj["metadata"]["uid"])
        if obj["metadata"].get("finalizers") or self._graceful(resource, obj, grace_seconds):
            if "deletionTimestamp" not in obj["metadata"]:
                grace = grace_seconds if grace_seconds is not None else _grace_seconds(resource, obj)
                self._terminate(resource, key, obj, grace)
        else:
            if resource == PODS:  # as kinds with graceful deletion do, even if there is no grace
                self._terminate(resource, key, obj, 0)
            self._remove(resource, key)
        self._leave(call, obj)

    async def watch(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        resource_version: str,
        label_selector: str = "",
        timeout_seconds: int = 300,
    ) -> AsyncIterator[WatchEvent]:
        """Lasts until `close_watches`; `timeout_seconds` is not counted."""
        await self._enter(Call("watch", resource, namespace))
        since = int(resource_version or 0)
        if since < self._oldest:
            raise ApiError(410, "Expired", f"too old resource version: {since} ({self._oldest})")
        queue: asyncio.Queue[_Change | ApiError | None] = asyncio.Queue()
        for past in self._history:
            if past.version > since:
                queue.put_nowait(past)
        stream = next(self._stream_ids)
        self._streams[stream] = queue
        try:
            while (change := await queue.get()) is not None:
                if isinstance(change, ApiError):
                    raise change
                event = _seen(change, resource, namespace, label_selector)
                if event is not None:
                    yield event
        finally:
            del self._streams[stream]

    # ---- inside -------------------------------------------------------------------------------------

    async def _enter(self, call: Call) -> None:
        """Every request gives way once, so that races between tasks can show."""
        self.calls.append(call)
        await asyncio.sleep(0)
        failure = next((f for f in self._failures if f.fits(call) and not f.after), None)
        if failure is not None:
            self._spend(failure)
            raise failure.error

    def _leave(self, call: Call, obj: Object) -> Object:
        failure = next((f for f in self._failures if f.fits(call) and f.after), None)
        if failure is not None:
            self._spend(failure)
            raise failure.error
        return copy.deepcopy(obj)

    def _spend(self, failure: _Failure) -> None:
        failure.times -= 1
        if failure.times <= 0:
            self._failures.remove(failure)

    def _uid(self) -> str:
        return f"00000000-0000-4000-8000-{next(self._uids):012d}"

    def _of(self, resource: Resource) -> dict[tuple[str, str], Object]:
        return self.objects.setdefault(resource, {})

    def _existing(self, resource: Resource, namespace: str | None, name: str) -> Object:
        try:
            return self._of(resource)[(namespace or "", name)]
        except KeyError:
            raise ApiError(404, "NotFound", f'{resource.plural} "{name}" not found') from None

    def _check_preconditions(self, resource: Resource, name: str, obj: Object, wanted: Object) -> None:
        for field in ("uid", "resourceVersion"):
            if wanted.get(field) not in (None, "", obj["metadata"].get(field)):
                raise ApiError(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {resource.plural} "{name}": {field} is '
                    f"{obj['metadata'].get(field)}, not {wanted[field]}",
                )

    def _update(
        self, resource: Resource, key: tuple[str, str], old: Object, new: Object, subresource: str | None
    ) -> Object:
        if subresource == "status":
            if resource not in WITH_STATUS:
                raise ApiError(404, "NotFound", "the server could not find the requested resource")
            new = {**copy.deepcopy(old), "status": new.get("status", {})}
        elif resource in WITH_STATUS:
            new.pop("status", None)
            if "status" in old:
                new["status"] = copy.deepcopy(old["status"])
        kept = ("uid", "creationTimestamp", "namespace", "name", "deletionTimestamp", "generation")
        for field in kept:
            new["metadata"].pop(field, None)
            if field in old["metadata"]:
                new["metadata"][field] = old["metadata"][field]
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        if new.get("spec") != old.get("spec"):
            new["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1
        if new == old:  # the API server makes no new version of an object that did not change
            return old
        freed = old["metadata"].get("finalizers") and not new["metadata"].get("finalizers")
        if freed and "deletionTimestamp" in new["metadata"] and not self._graceful(resource, new, None):
            return self._remove(resource, key)
        return self._store(resource, key, new, "MODIFIED", old)

    def _store(
        self, resource: Resource, key: tuple[str, str], obj: Object, kind: str, old: Object | None
    ) -> Object:
        self._version += 1
        obj["metadata"]["resourceVersion"] = str(self._version)
        self._of(resource)[key] = obj
        self._publish(_Change(self._version, kind, resource, obj, old))
        return copy.deepcopy(obj)

    def _remove(self, resource: Resource, key: tuple[str, str]) -> Object:
        old = self._of(resource).pop(key)
        self._version += 1
        gone = copy.deepcopy(old)
        gone["metadata"]["resourceVersion"] = str(self._version)
        self._publish(_Change(self._version, "DELETED", resource, gone, old))
        if self.gc:
            self._collect(old["metadata"]["uid"])
        return gone

    def _terminate(self, resource: Resource, key: tuple[str, str], obj: Object, grace: int) -> None:
        new = copy.deepcopy(obj)
        new["metadata"] |= {"deletionTimestamp": CREATION_TIME, "deletionGracePeriodSeconds": grace}
        self._store(resource, key, new, "MODIFIED", obj)

    def _publish(self, change: _Change) -> None:
        self._history.append(change)
        for queue in self._streams.values():
            queue.put_nowait(change)

    def _graceful(self, resource: Resource, obj: Object, grace_seconds: int | None) -> bool:
        """A pod on a node stays until its kubelet has stopped it (registry/core/pod CheckGracefulDelete)."""
        return (
            resource == PODS
            and grace_seconds != 0
            and bool(obj.get("spec", {}).get("nodeName"))
            and obj.get("status", {}).get("phase") not in ("Succeeded", "Failed")
        )

    def _dependents(self, uid: str) -> Sequence[tuple[Resource, tuple[str, str], Object]]:
        return [
            (resource, key, obj)
            for resource, objects in self.objects.items()
            for key, obj in list(objects.items())
            if any(r.get("uid") == uid for r in obj["metadata"].get("ownerReferences", []))
        ]

    def _orphan(self, uid: str) -> None:
        for resource, key, obj in self._dependents(uid):
            new = copy.deepcopy(obj)
            new["metadata"]["ownerReferences"] = [
                r for r in obj["metadata"]["ownerReferences"] if r.get("uid") != uid
            ]
            self._store(resource, key, new, "MODIFIED", obj)

    def _collect(self, uid: str) -> None:
        for resource, key, obj in self._dependents(uid):
            if len(obj["metadata"]["ownerReferences"]) == 1 and key in self._of(resource):
                self._remove(resource, key)


def _grace_seconds(resource: Resource, obj: Object) -> int:
    return obj.get("spec", {}).get("terminationGracePeriodSeconds", 30) if resource == PODS else 0


def _seen(change: _Change, resource: Resource, namespace: str | None, selector: str) -> WatchEvent | None:
    """The event that a watcher with this selector gets: what no longer matches is DELETED for it."""
    if change.type == "BOOKMARK":
        return WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": str(change.version)}})
    if change.resource != resource or namespace not in (None, change.new["metadata"].get("namespace", "")):
        return None
    was = change.old is not None and matches(selector, change.old)
    now = change.type != "DELETED" and matches(selector, change.new)
    if not was and not now:
        return None
    kind = "MODIFIED" if was and now else "ADDED" if now else "DELETED"
    return WatchEvent(kind, copy.deepcopy(change.new))
