"""The store never goes back in time, whatever order its news come in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainyard_operator.kube import store as store_module
from trainyard_operator.kube.api import Object
from trainyard_operator.kube.store import Key, Store


def obj(name: str, version: int, *, uid: str = "", owner: str = "", **meta: Any) -> Object:
    references = [{"uid": owner, "controller": True}, {"uid": "other"}] if owner else []
    more = {"ownerReferences": references} if owner else {}
    found = {"name": name, "namespace": "ns", "uid": uid or f"u-{name}", "resourceVersion": str(version)}
    return {"metadata": found | more | meta, "version": version}


class Heard:
    def __init__(self) -> None:
        self.changes: list[tuple[str, int | None, int | None]] = []

    def __call__(self, key: Key, old: Object | None, new: Object | None) -> None:
        versions = [None if o is None else o["version"] for o in (old, new)]
        self.changes.append((key[1], versions[0], versions[1]))


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def store(heard: Heard) -> Store:
    return Store(heard)


def test_an_older_event_does_not_undo_a_newer_write(store: Store, heard: Heard) -> None:
    assert store.upsert(obj("a", 9))
    assert store.upsert(obj("a", 10)), "numbers, not strings"
    assert not store.upsert(obj("a", 9)) and not store.upsert(obj("a", 10))
    found = store.get("ns", "a")
    assert found is not None and found["version"] == 10
    assert heard.changes == [("a", None, 9), ("a", 9, 10)]


def test_a_deleted_object_does_not_come_back_by_a_late_answer(store: Store, heard: Heard) -> None:
    store.upsert(obj("a", 1))
    assert store.remove(obj("a", 3))
    assert not store.upsert(obj("a", 2))
    assert store.get("ns", "a") is None and store.by_uid("u-a") is None and len(store) == 0
    assert not store.remove(obj("b", 5)) and not store.upsert(obj("b", 4)), "deleted before it was heard of"
    assert heard.changes == [("a", None, 1), ("a", 1, None)]


def test_an_object_that_left_the_selector_may_come_back(store: Store) -> None:
    store.upsert(obj("a", 1))
    store.remove(obj("a", 2))
    assert store.upsert(obj("a", 3))


def test_an_old_deletion_does_not_take_a_newer_state(store: Store) -> None:
    store.upsert(obj("a", 5))
    assert not store.remove(obj("a", 4)) and len(store) == 1


def test_a_name_that_is_used_again_is_another_object(store: Store, heard: Heard) -> None:
    store.upsert(obj("a", 1, uid="first", owner="o1"))
    store.upsert(obj("a", 5, uid="second", owner="o2"))
    assert store.by_uid("first") is None and store.owned_by("o1") == []
    assert heard.changes == [("a", None, 1), ("a", 1, None), ("a", None, 5)]
    assert not store.remove(obj("a", 4, uid="first")), "the late deletion of the first"
    assert not store.upsert(obj("a", 3, uid="first"))
    assert [o["metadata"]["uid"] for o in store] == ["second"]


def test_owners_are_found_by_their_uid_and_can_change(store: Store) -> None:
    store.upsert(obj("b", 1, owner="o"))
    store.upsert(obj("a", 2, owner="o"))
    store.upsert(obj("c", 3, owner="p"))
    assert [o["metadata"]["name"] for o in store.owned_by("o")] == ["b", "a"]
    assert store.owned_by("other") == [], "not a controller"
    store.upsert(obj("b", 4, owner="p"))
    store.remove(obj("c", 5, owner="p"))
    assert [o["metadata"]["name"] for o in store.owned_by("p")] == ["b"]
    assert [o["metadata"]["name"] for o in store.owned_by("o")] == ["a"]


def test_managed_fields_are_dropped(store: Store) -> None:
    store.upsert(obj("a", 1, managedFields=[{"manager": "x"}]))
    found = store.get("ns", "a")
    assert found is not None and "managedFields" not in found["metadata"]


def test_a_list_deletes_what_it_lacks_but_not_what_was_written_after_it(store: Store, heard: Heard) -> None:
    for name, version in {"gone": 1, "kept": 2, "changed": 3, "newer": 20}.items():
        store.upsert(obj(name, version))
    heard.changes.clear()
    store.replace([obj("kept", 2), obj("changed", 8), obj("new", 9)], "10")
    assert sorted(o["metadata"]["name"] for o in store) == ["changed", "kept", "new", "newer"]
    assert sorted(heard.changes, key=str) == [("changed", 3, 8), ("gone", 1, None), ("new", None, 9)]
    assert not store.upsert(obj("gone", 1)), "a late answer"


def test_a_list_of_one_namespace_says_nothing_about_others(store: Store) -> None:
    other = obj("a", 1, uid="x")
    other["metadata"]["namespace"] = "other"
    store.upsert(other)
    store.upsert(obj("a", 2))
    store.replace([], "10", namespace="ns")
    assert [o["metadata"]["namespace"] for o in store] == ["other"]


def test_a_server_that_went_back_is_believed(store: Store) -> None:
    store.upsert(obj("a", 100))
    store.upsert(obj("b", 101))
    store.remove(obj("c", 102))
    store.replace([obj("a", 50), obj("c", 51)], "60", rewound=True)
    assert {o["metadata"]["name"]: o["version"] for o in store} == {"a": 50, "c": 51}


def test_an_accepted_delete_shows_at_once_and_stays(store: Store, heard: Heard) -> None:
    store.upsert(obj("a", 1))
    store.mark_deleting("u-a")
    store.mark_deleting("u-a")
    store.mark_deleting("unknown")
    store.upsert(obj("a", 2))
    found = store.get("ns", "a")
    assert found is not None and found["version"] == 2 and found["metadata"]["deletionTimestamp"]
    assert len(heard.changes) == 3
    store.remove(obj("a", 3))
    assert len(store) == 0


def test_a_listener_that_fails_is_no_ones_loss(caplog: pytest.LogCaptureFixture) -> None:
    def broken(key: Key, old: Object | None, new: Object | None) -> None:
        raise RuntimeError("bug")

    heard = Heard()
    store = Store(broken)
    store.subscribe(heard)
    store.upsert(obj("a", 1))
    assert heard.changes == [("a", None, 1)] and "a listener of the store failed" in caplog.text


def test_tombstones_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_TOMBSTONES", 3)
    for number in range(10):
        store.remove(obj(f"o{number}", 100))
    assert not store.upsert(obj("o9", 5)) and store.upsert(obj("o0", 5))


# A history as etcd has it: each entry a new version of one of three names; "delete" ends a UID.
flag, number = st.booleans(), st.integers(0, 20)
HISTORY = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "put", "delete"])), max_size=20)


@settings(max_examples=150, deadline=None)
@given(HISTORY, st.data())
def test_any_interleaving_of_watch_and_answers_ends_in_the_truth(
    history: list[tuple[str, str]], data: st.DataObject
) -> None:
    """The watch tells changes in order; any of the puts are also told by an answer at any other moment, earlier
    or later, once or more; a list may come at any time, and what it covers is then told by no watch. No listener
    ever sees one object's versions go back, and in the end the store has what the server has."""
    live: dict[str, str] = {}
    truth: dict[str, int] = {}
    frames: list[tuple[str, Object]] = []
    snapshots: list[tuple[int, dict[str, Object]]] = []
    latest: dict[str, Object] = {}
    for version, (name, what) in enumerate(history, start=1):
        if what == "put":
            uid = live.setdefault(name, f"{name}-{version}")
            latest[name] = obj(name, version, uid=uid)
            frames.append(("put", latest[name]))
            truth[name] = version
        elif name in live:
            frames.append(("delete", obj(name, version, uid=live.pop(name))))
            del truth[name], latest[name]
        snapshots.append((version, dict(latest)))
    seen: dict[str, int] = {}

    def listener(key: Key, old: Object | None, new: Object | None) -> None:
        if new is not None:
            uid = new["metadata"]["uid"]
            assert new["version"] >= seen.get(uid, 0), "went back"
            seen[uid] = new["version"]

    store = Store(listener)
    puts = [o for kind, o in frames if kind == "put"]
    listed_at = 0
    for kind, frame in frames:
        if data.draw(flag) and puts:
            store.upsert(puts[data.draw(number) % len(puts)])
        if frame["version"] <= listed_at:
            continue  # a watch begins where the list ended
        (store.upsert if kind == "put" else store.remove)(frame)
        if data.draw(number) % 5 == 0:
            # A list is never older than what the watch has told: the reflector is one task.
            newer = [s for s in snapshots if s[0] >= frame["version"]]
            listed_at, listed = newer[data.draw(number) % len(newer)]
            store.replace(listed.values(), str(listed_at))
    for late in data.draw(st.lists(number, max_size=5)) if puts else ():
        store.upsert(puts[late % len(puts)])
    assert {o["metadata"]["name"]: o["version"] for o in store} == truth
    assert {store.by_uid(o["metadata"]["uid"])["version"] for o in store} == set(truth.values())  # type: ignore[index]
