"""Whatever agents, pods or people with `kubectl edit --subresource=status` write: the planner decides.

And what it writes is what the CRD's schema takes: a status that the API server refuses would never converge.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.builders import SETTINGS, T0, Scene, a_run, quiet
from trainyard_api.protocol import AgentPhase, Beat, Checkpoint, Failure, Progress, Resumed
from trainyard_api.v1alpha1 import (
    AttemptStatus,
    Cause,
    CheckpointStatus,
    Condition,
    NodesStatus,
    Restarts,
    Status,
)
from trainyard_operator.plan import Observed, plan
from trainyard_operator.plan.model import Member, PodView

INTS = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 2, 3])
FLOATS = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, T0, T0 + 5])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["Running", "Suspended", "True", "2027-01-15T08:00:00Z", "Evicted"]
)
SMALL = st.integers(-2, 4)

PROGRESS = st.builds(
    Progress,
    step=INTS,
    total_steps=st.none() | INTS,
    epoch=INTS,
    loss=st.none() | FLOATS,
    samples_per_second=FLOATS,
)
BEATS = st.builds(
    Beat,
    pod_name=TEXTS,
    pod_uid=TEXTS,
    incarnation=TEXTS,
    node_index=INTS,
    pod_ip=TEXTS,
    attempt=SMALL | INTS,
    phase=st.sampled_from(AgentPhase),
    ready=st.booleans(),
    progress=st.none() | PROGRESS,
    resumed=st.none()
    | st.builds(Resumed, attempt=SMALL, step=INTS, uri=TEXTS, first_step_time=st.none() | FLOATS),
    checkpoint=st.none() | st.builds(Checkpoint, step=INTS, seq=INTS, uri=TEXTS, time=FLOATS),
    failure=st.none()
    | st.builds(
        Failure,
        attempt=SMALL,
        rank=st.none() | INTS,
        exit_code=st.none() | INTS,
        exception=TEXTS,
        message=TEXTS,
        time=FLOATS,
        collateral=st.booleans(),
    ),
    warnings=st.lists(TEXTS, max_size=2),
)
MESSAGES = TEXTS | st.sampled_from(
    [
        '{"attempt": 1, "outcome": "failed", "exitCode": "x"}',
        "[]",
        "{",
        '{"attempt": 1, "outcome": "failed"}',
        "[" * 9999,
    ]
)
PODS = st.builds(
    PodView,
    name=st.sampled_from(["demo-0-1", "demo-1-1", "demo-0-2", "x"]),
    uid=st.sampled_from(["a", "b", "c"]),
    index=SMALL,
    created_in=SMALL,
    phase=st.sampled_from(["Pending", "Running", "Succeeded", "Failed", "Unknown", "?"]),
    ip=TEXTS,
    deleting=st.booleans(),
    creation_time=FLOATS,
    reason=TEXTS,
    unschedulable=TEXTS,
    waiting_reason=st.sampled_from(["", "ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError"]),
    exit_code=st.none() | INTS,
    termination_message=MESSAGES,
)
CAUSES = st.none() | st.builds(Cause, reason=TEXTS, failure_class=TEXTS)
STATUSES = st.builds(
    Status,
    phase=st.sampled_from(
        ["", "Pending", "Running", "Restarting", "Suspending", "Suspended", "Complete", "?"]
    ),
    attempt=SMALL | INTS,
    nodes=st.builds(NodesStatus, desired=SMALL | INTS, ready=INTS),
    step=st.none() | INTS,
    best_step=INTS,
    checkpoint=st.none() | st.builds(CheckpointStatus, step=INTS, seq=INTS, uri=TEXTS),
    restarts=st.builds(Restarts, user=INTS, infrastructure=INTS, without_progress=INTS),
    not_before=TEXTS,
    attempts=st.lists(
        st.builds(
            AttemptStatus,
            attempt=SMALL,
            start_time=TEXTS,
            run_time=TEXTS,
            first_step_time=TEXTS,
            cause=CAUSES,
        ),
        max_size=10,
    ),
    active_seconds=INTS,
    active_since=TEXTS,
    conditions=st.lists(st.builds(Condition, type=TEXTS, status=TEXTS, reason=TEXTS), max_size=3),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    status=STATUSES,
    pods=st.lists(PODS, max_size=4),
    members=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.tuples(BEATS, FLOATS), max_size=3),
    suspend=st.booleans(),
    now=st.sampled_from([T0, T0 + 100.5]),
)
def test_nothing_makes_it_raise(
    status: Status, pods: list[PodView], members: dict[str, Any], suspend: bool, now: float
) -> None:
    run = replace(a_run().suspended(suspend).build(), status=status)
    heard = {uid: Member(beat=beat, received=received) for uid, (beat, received) in members.items()}
    decided = plan(Observed(run=run, pods=tuple(pods), members=heard, now=now), SETTINGS)
    if decided.status is not None:
        text = json.dumps(decided.status.to_json(), allow_nan=False)
        assert len(text) < 32 * 1024
        assert len(decided.status.attempts) <= 10
        assert decided.status.attempt >= status.attempt
    for event in decided.events:
        assert len(event.message) <= 1024 and event.message.isprintable()
    assert decided.requeue_after is None or 0 <= decided.requeue_after < math.inf


POISON = [
    {"progress": Progress(step=2**70, total_steps=-4, epoch=-1, loss=math.nan, samples_per_second=-math.inf)},
    {"progress": Progress(step=-5, loss=math.inf)},
    {"checkpoint": Checkpoint(step=-1, seq=2**80, uri="\x00" * 9999, time=math.nan)},
    {"resumed": Resumed(attempt=1, step=-7, uri="x" * 9999, first_step_time=1e300)},
    {"warnings": ["\x1b[2J" * 999]},
    {"node_index": 10**9},
]


@pytest.mark.parametrize("fields", POISON)
def test_poison_in_a_beat_converges(fields: dict[str, Any]) -> None:
    scene = Scene().started().stepping(5)
    scene.hear(replace(scene.say(0).beat, **fields))
    scene.wait(20)
    scene.settle()
    status = scene.status
    assert status.attempt == 1 and status.phase == "Running"
    json.dumps(status.to_json(), allow_nan=False)
    assert 0 <= (status.step or 0) < 2**53
    assert quiet(scene.plan())


def test_a_status_that_was_edited_away_is_begun_anew_without_harm() -> None:
    scene = Scene().started().stepping(5)
    scene.status = Status()
    scene.settle()
    assert scene.status.attempt == 1 and set(scene.pods) == {"demo-0-1", "demo-1-1"}
    assert scene.status.phase == "Running"  # the agents still train attempt 1


def test_history_that_was_edited_away_comes_back() -> None:
    scene = Scene().started().stepping(5)
    scene.status = replace(scene.status, attempts=[])
    before = dict(scene.directives)
    scene.settle()
    assert [e.attempt for e in scene.status.attempts] == [1] and scene.status.attempts[0].run_time
    assert scene.directives == before


def test_a_size_in_the_status_that_nobody_could_have_meant_is_ignored() -> None:
    scene = Scene().started().stepping(5)
    scene.status = replace(scene.status, nodes=NodesStatus(desired=10**9))
    scene.settle()
    assert scene.status.attempt == 1 and scene.status.nodes.desired == 2
