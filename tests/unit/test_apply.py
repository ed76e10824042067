"""Plans against an API server that conflicts, refuses and loses answers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.builders import RUN_UID, SETTINGS, a_run
from tests.fakes.api import FakeApi, merge
from trainyard_api.contract import FINALIZER
from trainyard_api.protocol import Action, Directive
from trainyard_api.v1alpha1 import Status, TrainingRun
from trainyard_operator.apply import PARALLEL, Applier, Conflict, merge_diff
from trainyard_operator.kube.api import PODS, RUNS, ApiError
from trainyard_operator.kube.recorder import Regarding
from trainyard_operator.kube.store import Store
from trainyard_operator.plan.model import CreatePod, DeletePod, EventNote, Plan
from trainyard_operator.plan.pods import desired_pod

DIRECTIVES = {"u": Directive(action=Action.HOLD, attempt=1)}
NOTE = EventNote(reason="Started", message="it began")


class Sinks:
    """Takes directives and Events, with the number of API calls that were made before them."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api
        self.published: list[tuple[str, Any, int]] = []
        self.events: list[tuple[str, str, bool]] = []

    def publish(self, run_uid: str, directives: Any) -> None:
        self.published.append((run_uid, directives, len(self.api.calls)))

    def event(
        self,
        regarding: Regarding,
        reason: str,
        note: str,
        *,
        warning: bool = False,
        action: str = "Reconcile",
    ) -> None:
        self.events.append((regarding.uid, reason, warning))


class Rig:
    def __init__(self) -> None:
        self.api = FakeApi()
        self.runs, self.pods = Store(), Store()
        self.sinks = Sinks(self.api)
        self.applier = Applier(self.api, self.runs, self.pods, self.sinks, self.sinks)
        seeded = self.api.seed(RUNS, a_run().with_status({"attempt": 1}).object())
        self.run = TrainingRun.from_object(seeded)

    def wanted(self, index: int, attempt: int = 1) -> CreatePod:
        body = desired_pod(a_run().with_status({"attempt": attempt}).build(), index, SETTINGS)
        return CreatePod(name=body["metadata"]["name"], body=body)


async def test_everything_happens_in_the_promised_order() -> None:
    rig = Rig()
    old = rig.api.seed(PODS, rig.wanted(0).body)
    rig.pods.upsert(old)
    await rig.applier.apply(
        rig.run,
        Plan(
            status=Status(attempt=1, phase="Pending"),
            delete_pods=(DeletePod(name="demo-0-1", uid=old["metadata"]["uid"], why="test"),),
            create_pods=(rig.wanted(1),),
            directives=DIRECTIVES,
            events=(NOTE,),
        ),
    )
    assert rig.api.verbs() == ["patch", "delete", "create"]
    assert rig.sinks.published == [(RUN_UID, DIRECTIVES, 3)]
    assert rig.sinks.events == [(RUN_UID, "Started", False)]


async def test_a_conflict_drops_the_rest_of_the_plan() -> None:
    rig = Rig()
    await rig.api.merge_patch(RUNS, "team", "demo", {"metadata": {"labels": {"a": "b"}}})
    rig.api.calls.clear()
    with pytest.raises(Conflict):
        await rig.applier.apply(
            rig.run,
            Plan(
                status=Status(attempt=2), create_pods=(rig.wanted(0),), directives=DIRECTIVES, events=(NOTE,)
            ),
        )
    assert rig.api.verbs() == ["patch"] and not rig.sinks.published and not rig.sinks.events


async def test_a_run_that_is_gone_is_a_conflict_too() -> None:
    rig = Rig()
    rig.api.objects[RUNS].clear()
    with pytest.raises(Conflict):
        await rig.applier.apply(rig.run, Plan(status=Status(attempt=2)))


async def test_other_errors_of_the_status_write_are_raised_before_anything_else() -> None:
    rig = Rig()
    rig.api.fail_next("patch", ApiError(503, "Unavailable", "later"))
    with pytest.raises(ApiError, match="503"):
        await rig.applier.apply(rig.run, Plan(status=Status(attempt=2), create_pods=(rig.wanted(0),)))
    assert rig.api.verbs() == ["patch"]


async def test_only_what_changed_is_sent_and_the_answer_is_remembered() -> None:
    rig = Rig()
    await rig.applier.apply(rig.run, Plan(status=Status(attempt=2)))
    (call,) = rig.api.calls
    assert call.subresource == "status"
    assert call.body == {"metadata": {"resourceVersion": rig.run.resource_version}, "status": {"attempt": 2}}
    known = rig.runs.get("team", "demo")
    assert known is not None and known["status"]["attempt"] == 2


async def test_finalizers_are_written_whole_and_guarded() -> None:
    rig = Rig()
    await rig.applier.apply(rig.run, Plan(finalizers=("other/x", FINALIZER)))
    (call,) = rig.api.calls
    assert call.subresource is None
    version = rig.run.resource_version
    assert call.body == {"metadata": {"resourceVersion": version, "finalizers": ["other/x", FINALIZER]}}
    known = rig.runs.get("team", "demo")
    assert known is not None and known["metadata"]["finalizers"] == ["other/x", FINALIZER]


async def test_finalizers_of_a_run_that_has_changed_are_left_alone() -> None:
    rig = Rig()
    await rig.api.merge_patch(RUNS, "team", "demo", {"metadata": {"finalizers": ["other/x"]}})
    with pytest.raises(Conflict):
        await rig.applier.apply(rig.run, Plan(finalizers=(FINALIZER,), directives=DIRECTIVES))
    stored = rig.api.peek(RUNS, "team", "demo")
    assert stored is not None and stored["metadata"]["finalizers"] == ["other/x"] and not rig.sinks.published


async def test_a_namespace_that_ends_takes_no_pod_ever() -> None:
    rig = Rig()
    message = "unable to create new content in namespace team because it is being terminated"
    rig.api.fail_next("create", ApiError(403, "Forbidden", message, causes=("NamespaceTerminating",)))
    applied = await rig.applier.apply(rig.run, Plan(create_pods=(rig.wanted(0),)))
    assert applied.refused == {"demo-0-1": message} and applied.hopeless == {"demo-0-1"}
    rig.api.fail_next("create", ApiError(403, "Forbidden", "exceeded quota"))
    assert not (await rig.applier.apply(rig.run, Plan(create_pods=(rig.wanted(0),)))).hopeless


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"a": 1}),
        ({"a": 1, "b": 2}, {"a": 1}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"x": 1}}),
        ({"a": {"x": 1}}, {"a": {"x": 1, "z": {"q": 1}}}),
        ({"a": [1, 2]}, {"a": [2]}),
        ({"a": {"x": 1}}, {"a": 3}),
        ({"a": 3}, {"a": {"x": 1}}),
        ({"a": {}}, {"a": {"x": 1}}),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_the_patch_makes_the_new_of_the_old(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert merge(old, merge_diff(old, new)) == new
    unknown = {**old, "unknown": {"k": 1}}
    assert merge(unknown, merge_diff(old, new)) == {**new, "unknown": {"k": 1}}
    if old == new:
        assert merge_diff(old, new) == {}


async def test_a_delete_names_the_uid_and_the_wrong_one_is_spared() -> None:
    rig = Rig()
    pod = rig.api.seed(PODS, rig.wanted(0).body)
    await rig.applier.apply(
        rig.run, Plan(delete_pods=(DeletePod(name="demo-0-1", uid="of-another", why=""),))
    )
    assert rig.api.peek(PODS, "team", "demo-0-1") is not None
    await rig.applier.apply(
        rig.run, Plan(delete_pods=(DeletePod(name="demo-0-1", uid=pod["metadata"]["uid"], why=""),))
    )
    assert rig.api.peek(PODS, "team", "demo-0-1") is None
    await rig.applier.apply(rig.run, Plan(delete_pods=(DeletePod(name="demo-0-1", uid="x", why=""),)))  # 404


async def test_a_delete_shows_in_the_cache_at_once() -> None:
    rig = Rig()
    body = rig.wanted(0).body
    body["spec"]["nodeName"] = "n"
    pod = rig.api.seed(PODS, body)
    rig.pods.upsert(pod)
    uid = pod["metadata"]["uid"]
    await rig.applier.apply(rig.run, Plan(delete_pods=(DeletePod(name="demo-0-1", uid=uid, why=""),)))
    known = rig.pods.by_uid(uid)
    assert known is not None and "deletionTimestamp" in known["metadata"]


async def test_a_create_shows_in_the_cache_at_once() -> None:
    rig = Rig()
    applied = await rig.applier.apply(rig.run, Plan(create_pods=(rig.wanted(0), rig.wanted(1))))
    assert applied.created == {"demo-0-1", "demo-1-1"}
    assert len(rig.pods.owned_by(RUN_UID)) == 2


async def test_a_create_whose_answer_was_lost_is_found_the_next_time() -> None:
    rig = Rig()
    rig.api.fail_next("create", ApiError(0, "Timeout", "no answer"), after=True)
    plan = Plan(create_pods=(rig.wanted(0),))
    with pytest.raises(ApiError):
        await rig.applier.apply(rig.run, plan)
    applied = await rig.applier.apply(rig.run, plan)
    assert applied.created == {"demo-0-1"} and len(rig.pods.owned_by(RUN_UID)) == 1
    assert len(rig.api.all(PODS)) == 1


async def test_a_name_that_somebody_else_has_is_refused_and_his_pod_is_not_touched() -> None:
    rig = Rig()
    theirs = rig.wanted(0).body
    theirs["metadata"]["ownerReferences"][0]["uid"] = "another-run"
    before = rig.api.seed(PODS, theirs)
    applied = await rig.applier.apply(rig.run, Plan(create_pods=(rig.wanted(0),)))
    assert not applied.created and "not of this run" in applied.refused["demo-0-1"]
    assert rig.api.peek(PODS, "team", "demo-0-1") == before


@pytest.mark.parametrize(("status", "reason"), [(403, "Forbidden"), (422, "Invalid"), (400, "BadRequest")])
async def test_what_the_server_will_not_take_is_reported_in_its_words(status: int, reason: str) -> None:
    rig = Rig()
    rig.api.fail_next("create", ApiError(status, reason, "exceeded quota"), name="demo-1-1")
    applied = await rig.applier.apply(
        rig.run, Plan(create_pods=(rig.wanted(0), rig.wanted(1)), directives=DIRECTIVES)
    )
    assert applied.created == {"demo-0-1"} and applied.refused == {"demo-1-1": "exceeded quota"}
    assert rig.sinks.published


@pytest.mark.parametrize("verb", ["create", "delete"])
@pytest.mark.parametrize("status", [0, 429, 500, 503])
async def test_a_server_in_trouble_is_raised_after_all_else_was_done(verb: str, status: int) -> None:
    rig = Rig()
    old = rig.api.seed(PODS, rig.wanted(5).body)
    rig.api.fail_next(verb, ApiError(status, "Trouble", "later"), times=2)
    plan = Plan(
        delete_pods=(DeletePod(name="demo-5-1", uid=old["metadata"]["uid"], why=""),),
        create_pods=(rig.wanted(0),),
        directives=DIRECTIVES,
        events=(NOTE,),
    )
    with pytest.raises(ApiError, match=str(status)):
        await rig.applier.apply(rig.run, plan)
    assert rig.sinks.published and rig.sinks.events
    assert set(rig.api.verbs()) == {"create", "delete"}


async def test_no_directives_leaves_the_agents_as_they_are() -> None:
    rig = Rig()
    await rig.applier.apply(rig.run, Plan())
    assert not rig.sinks.published
    await rig.applier.apply(rig.run, Plan(directives={}))
    assert rig.sinks.published == [(RUN_UID, {}, 0)]


async def test_the_run_is_deleted_by_uid() -> None:
    rig = Rig()
    await rig.applier.apply(rig.run, Plan(delete_run=True))
    (call,) = rig.api.calls
    assert call.body == {"uid": RUN_UID, "propagation": "Background"}
    assert rig.api.peek(RUNS, "team", "demo") is None
    await rig.applier.apply(rig.run, Plan(delete_run=True))  # somebody was faster


async def test_creates_are_parallel_but_bounded() -> None:
    class Counting(FakeApi):
        now = most = 0

        async def create(self, *args: Any, **kwargs: Any) -> Any:
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                return await super().create(*args, **kwargs)
            finally:
                self.now -= 1

    rig = Rig()
    api = Counting()
    applier = Applier(api, rig.runs, rig.pods, rig.sinks, rig.sinks)
    applied = await applier.apply(rig.run, Plan(create_pods=tuple(rig.wanted(i) for i in range(200))))
    assert len(applied.created) == 200 and api.most == PARALLEL
