"""What the operator knows of the objects of one kind. It never goes back in time.

Two sources feed it: the watch, and the answers to our own writes. So a round that follows a write sees at
least that write (what client-go does with "expectations"). Versions are compared as integers, which the
API allows between objects of one resource type (KEP-5504).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from trainyard_operator.kube.api import Object

Key = tuple[str, str]
"""(namespace, name); namespace "" for what is cluster-scoped."""
OnChange = Callable[[Key, Object | None, Object | None], None]
"""(key, old, new): old is None for a new object, new is None for one that is gone."""

MAX_TOMBSTONES = 10_000
"""Deleted objects to remember (UID, version of the deletion): more than can be in answers under way."""

log = logging.getLogger(__name__)


def key_of(obj: Object) -> Key:
    meta = obj["metadata"]
    return meta.get("namespace", ""), meta["name"]


def version_of(obj: Object) -> int:
    """resourceVersion as a number. Raises ValueError or KeyError for what no API server sends."""
    return int(obj["metadata"]["resourceVersion"])


def controller_uid(obj: Object) -> str | None:
    """UID of the owner that has `controller: true`."""
    references = obj["metadata"].get("ownerReferences") or ()
    return next((r["uid"] for r in references if r.get("controller")), None)


class Store:
    """Objects by key, by UID and by their controller's UID; reads are O(1).

    What it returns is shared and must not be changed by the caller. `metadata.managedFields` is dropped: it
    is half of a pod's size and nobody reads it.
    """

    def __init__(self, on_change: OnChange | None = None) -> None:
        self._objects: dict[Key, Object] = {}
        self._by_uid: dict[str, Key] = {}
        self._owned: dict[str, dict[Key, None]] = {}
        self._dead: dict[str, int] = {}
        self._deleting: set[str] = set()
        self._horizons: dict[str | None, int] = {}
        """Version of the newest complete list, by its namespace (None: all)."""
        self._listeners: list[OnChange] = [on_change] if on_change else []

    def subscribe(self, on_change: OnChange) -> None:
        """Calls `on_change` after each change. It must be quick and must not change the store."""
        self._listeners.append(on_change)

    # ---- reading ------------------------------------------------------------------------------------

    def get(self, namespace: str, name: str) -> Object | None:
        return self._objects.get((namespace, name))

    def by_uid(self, uid: str) -> Object | None:
        key = self._by_uid.get(uid)
        return None if key is None else self._objects[key]

    def owned_by(self, uid: str) -> list[Object]:
        """Objects whose controller has this UID, in the order in which they were first seen."""
        return [self._objects[key] for key in self._owned.get(uid, ())]

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[Object]:
        return iter(list(self._objects.values()))

    # ---- writing ------------------------------------------------------------------------------------

    def upsert(self, obj: Object) -> bool:
        """Takes an object from a watch, a list or an answer. False if what is known is as new or newer."""
        meta = obj["metadata"]
        meta.pop("managedFields", None)
        key = key_of(obj)
        old = self._objects.get(key)
        # What a list lacked had been deleted by then, though we may never have heard of it.
        horizon = max(self._horizons.get(None, 0), self._horizons.get(key[0], 0)) if old is None else 0
        known = version_of(old) if old is not None else 0
        if version_of(obj) <= max(known, horizon, self._dead.get(meta["uid"], 0)):
            return False
        self._take(key, obj, old)
        return True

    def remove(self, obj: Object) -> bool:
        """Takes the last state of an object that was deleted, or that the selector no longer takes in.

        Nothing as old as that brings an object of this UID back. A newer state does: labels can be put back.
        """
        key, uid, version = key_of(obj), obj["metadata"]["uid"], version_of(obj)
        known = self._objects.get(key)
        if known is None or known["metadata"]["uid"] != uid:
            self._remember_dead(uid, version)
            return False
        if version_of(known) > version:
            return False
        self._bury(key, known, version)
        return True

    def mark_deleting(self, uid: str) -> None:
        """After the API server accepted a DELETE: shows the object as terminating before the watch says so.

        Sound because a deletionTimestamp is never taken back.
        """
        key = self._by_uid.get(uid)
        if key is None or uid in self._deleting:
            return
        self._deleting.add(uid)
        old = self._objects[key]
        if "deletionTimestamp" not in old["metadata"]:
            self._put(key, _marked(old), old)

    def replace(
        self,
        objects: Iterable[Object],
        resource_version: str,
        *,
        namespace: str | None = None,
        rewound: bool = False,
    ) -> None:
        """Takes a complete list. What it lacks is deleted, unless that was written after the list was made.

        `namespace` limits this to one namespace. `rewound` says that the server itself went back (etcd was
        restored from a backup), so that versions cannot be compared: the list is then the only truth.
        """
        listed = {key_of(obj): obj for obj in objects}
        horizon = int(resource_version)
        for key, known in list(self._objects.items()):
            if namespace not in (None, key[0]):
                continue
            gone = key not in listed and version_of(known) <= horizon
            if rewound or gone:
                self._bury(key, known, 0 if rewound else horizon)
        if rewound:
            self._dead.clear()
        self._horizons[namespace] = 0
        for obj in listed.values():
            self.upsert(obj)
        self._horizons[namespace] = horizon

    # ---- inside -------------------------------------------------------------------------------------

    def _take(self, key: Key, obj: Object, old: Object | None) -> None:
        """Puts a state that is known to be newer than `old`."""
        meta = obj["metadata"]
        if meta["uid"] in self._deleting and "deletionTimestamp" not in meta:
            obj = _marked(obj)
        if old is not None and old["metadata"]["uid"] != meta["uid"]:
            self._bury(key, old, version_of(obj))
            old = None
        self._put(key, obj, old)

    def _put(self, key: Key, obj: Object, old: Object | None) -> None:
        self._unindex(key, old)
        self._objects[key] = obj
        self._by_uid[obj["metadata"]["uid"]] = key
        owner = controller_uid(obj)
        if owner is not None:
            self._owned.setdefault(owner, {})[key] = None
        self._notify(key, old, obj)

    def _bury(self, key: Key, old: Object, version: int) -> None:
        uid = old["metadata"]["uid"]
        self._unindex(key, old)
        del self._objects[key]
        del self._by_uid[uid]
        self._deleting.discard(uid)
        self._remember_dead(uid, version)
        self._notify(key, old, None)

    def _remember_dead(self, uid: str, version: int) -> None:
        self._dead[uid] = max(version, self._dead.get(uid, 0))
        if len(self._dead) > MAX_TOMBSTONES:
            del self._dead[next(iter(self._dead))]

    def _unindex(self, key: Key, old: Object | None) -> None:
        owner = controller_uid(old) if old is not None else None
        if owner is not None and owner in self._owned:
            self._owned[owner].pop(key, None)
            if not self._owned[owner]:
                del self._owned[owner]

    def _notify(self, key: Key, old: Object | None, new: Object | None) -> None:
        for listener in self._listeners:
            try:
                listener(key, old, new)
            except Exception:  # one listener's bug must not cost the others their news
                log.exception("a listener of the store failed on %s/%s", *key)


def _marked(obj: Object) -> Object:
    """A copy that says it is being deleted; the time is that of the object's creation, as a placeholder."""
    meta = obj["metadata"]
    stamp = meta.get("creationTimestamp", "1970-01-01T00:00:00Z")
    return {**obj, "metadata": {**meta, "deletionTimestamp": stamp}}
