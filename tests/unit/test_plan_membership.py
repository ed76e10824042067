"""Who is a member, and the small pure parts around it."""

from __future__ import annotations

import math

import pytest

from tests.builders import T0, Scene, a_pod, a_run
from trainyard_api.contract import ConditionType, Reason
from trainyard_operator.plan import texts, times
from trainyard_operator.plan.conditions import with_condition
from trainyard_operator.plan.membership import choose
from trainyard_operator.plan.names import parse_pod_name, pod_name


def names(pods) -> list[str]:
    return sorted(p.name for p in pods)


def test_the_member_is_the_newest_pod_that_is_not_newer_than_the_attempt() -> None:
    pods = [a_pod(i, n).build() for i, n in [(0, 1), (0, 2), (0, 4), (1, 1), (2, 1), (-1, 1), (1, 0)]]
    chosen, surplus = choose(pods, attempt=3, size=2)
    assert {i: p.name for i, p in chosen.items()} == {0: "demo-0-2", 1: "demo-1-1"}
    assert names(surplus) == names(set(pods) - set(chosen.values()))


def test_the_choice_does_not_depend_on_the_order_of_the_list() -> None:
    pods = [a_pod(i, n).build() for i in range(3) for n in (1, 2)]
    assert choose(pods, 2, 3)[0] == choose(pods[::-1], 2, 3)[0]


@pytest.mark.parametrize(("index", "attempt"), [(0, 1), (12, 345)])
def test_names_can_be_read_back(index: int, attempt: int) -> None:
    assert parse_pod_name(pod_name("a-1-b", index, attempt)) == (index, attempt)


@pytest.mark.parametrize("name", ["", "a", "a-1", "a-b-1", "a--1", "a-1-99999999999999999999"])
def test_other_names_are_not_ours(name: str) -> None:
    assert parse_pod_name(name) is None


def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    def set_(before, status, reason, now):
        return with_condition(
            before, ConditionType.RUNNING, status, reason, f"at {now}", now=now, generation=1
        )

    first = set_([], False, Reason.CREATED, T0)
    second = set_(first, False, Reason.PODS_PENDING, T0 + 5)
    third = set_(second, True, Reason.TRAINING, T0 + 9)
    assert second[0].last_transition_time == first[0].last_transition_time == times.rfc3339(T0)
    assert second[0].reason == "PodsPending"
    assert third[0].last_transition_time == times.rfc3339(T0 + 9)
    assert len(third) == 1


@pytest.mark.parametrize("seconds", [0.0, 1.5, T0, 253402300799.0])
def test_times_can_be_read_back(seconds: float) -> None:
    assert times.parse(times.micro(seconds)) == pytest.approx(seconds, abs=1e-5)
    assert times.parse(times.rfc3339(seconds)) == math.floor(seconds)


@pytest.mark.parametrize("seconds", [-1e300, 1e300, math.inf, -math.inf, math.nan])
def test_absurd_times_are_written_as_some_time(seconds: float) -> None:
    assert times.parse(times.micro(seconds)) is not None


@pytest.mark.parametrize("text", ["", "x", "2026-13-01T00:00:00Z", "2026-01-01", "9" * 400])
def test_what_is_no_time_is_none(text: str) -> None:
    assert times.parse(text) is None


def test_texts_are_one_clean_line() -> None:
    assert texts.clean("a\nb\x00\x1b[31m\u2028c\ud800") == "a b [31m c"
    assert len(texts.clean("x" * 5000)) == texts.MAX_MESSAGE


def test_a_change_of_the_size_takes_effect_with_the_next_attempt() -> None:
    scene = Scene(a_run().with_nodes(2)).started().stepping(3)
    scene.edit(lambda run: run.with_nodes(3))
    scene.settle()
    assert scene.status.attempt == 1 and len(scene.pods) == 2
    scene.hear(scene.say(0).failed(1)).silence(1)
    scene.settle()
    assert scene.status.attempt == 2 and len(scene.pods) == 3
    assert scene.status.nodes.desired == 3
