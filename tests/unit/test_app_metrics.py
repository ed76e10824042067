"""Metrics: what is counted when, that labels stay few, and that docs/metrics.md is up to date."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from trainyard_api.protocol import Checkpoint
from trainyard_operator.collectors import Internals, InternalsCollector, RunsCollector, Watched, count_changes
from trainyard_operator.commits import CommitMeter
from trainyard_operator.metrics import Metrics
from trainyard_operator.metrics_doc import described, render

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def run(name: str, phase: str = "Running", **status: Any) -> dict[str, Any]:
    conditions = [{"type": phase, "status": "True"}] if phase in ("Complete", "Failed") else []
    status = {"phase": phase, "conditions": conditions, **status}
    return {"metadata": {"namespace": "ns", "name": name, "uid": name}, "status": status}


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name and label values in the labels' alphabetical order; only what is not zero."""
    text = generate_latest(metrics.registry).decode()
    return {
        (s.name, tuple(v for _, v in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.value and not s.name.endswith("_created")
    }


def test_the_page_is_up_to_date() -> None:
    expected = render()
    assert DOCS.read_text() == expected, "run: python -m trainyard_operator metrics-doc > docs/metrics.md"


def test_every_served_metric_is_described_and_the_other_way_round() -> None:
    metrics = Metrics()
    everything = Internals(
        watched={"pods": Watched(objects=1, last_heard=2.0, restarts={"closed": 3})},
        events={"posted": 4},
        kopf_starts=1,
    )
    full = run("a", attempt=2, step=5, checkpoint={"step": 4}, nodes={"ready": 1, "desired": 2})
    metrics.registry.register(InternalsCollector(lambda: everything))
    metrics.registry.register(RunsCollector(lambda: [full], lambda: 1))
    served = {
        family.name + ("_total" if family.type == "counter" else "") for family in metrics.registry.collect()
    }
    names = {d.name for d in described()}
    assert served == names
    assert all(not d.name.endswith("_total") or "run" not in d.labels for d in described())


def test_gauges_of_runs_come_from_the_cache_and_end_with_the_run() -> None:
    runs = [
        run("a", attempt=2, step=5, checkpoint={"step": 4}, nodes={"ready": 1, "desired": 2}),
        run("b", "Complete", attempt=1, step=9),
        {"metadata": {"namespace": "ns", "name": "new", "uid": "new"}},
    ]
    metrics = Metrics()
    metrics.registry.register(RunsCollector(lambda: runs, lambda: 7))
    found = samples(metrics)
    assert found[("trainyard_runs", ("Running",))] == 1
    assert found[("trainyard_runs", ("Complete",))] == 1
    assert found[("trainyard_runs", ("Pending",))] == 1
    assert found[("trainyard_agents_connected", ())] == 7
    of_a = {name: value for (name, labels), value in found.items() if labels == ("ns", "a")}
    assert of_a == {
        "trainyard_run_attempt": 2,
        "trainyard_run_step": 5,
        "trainyard_run_checkpoint_step": 4,
        "trainyard_run_nodes_ready": 1,
        "trainyard_run_nodes_desired": 2,
    }
    assert not [labels for _, labels in found if "b" in labels], "a finished run has no series"
    runs.clear()
    assert not [name for name, _ in samples(metrics) if name.startswith("trainyard_run")]


def test_each_failure_recovery_and_lost_step_is_counted_once() -> None:
    metrics = Metrics()
    first = {"attempt": 1, "startTime": "x"}
    cause = {"class": "user", "reason": "WorkerFailed", "rank": 1}
    failed = {**first, "cause": cause}
    second = {"attempt": 2}
    recovered = {"attempt": 2, "lostSteps": 12, "recoverySeconds": 4.5}
    versions = [
        run("a", attempts=[first]),
        run("a", attempts=[failed, second]),
        run("a", attempts=[failed, second], step=3),
        run("a", attempts=[failed, recovered]),
        run("a", attempts=[failed, recovered], step=4),
        run("a", attempts=[recovered, {"attempt": 3}]),  # the oldest line has left the history
    ]
    count_changes(metrics, None, versions[3])
    assert samples(metrics) == {}, "history from before this process is not counted again"
    for old, new in itertools.pairwise(versions):
        count_changes(metrics, old, new)
    found = samples(metrics)
    assert found[("trainyard_restarts_total", ("user", "WorkerFailed"))] == 1
    assert found[("trainyard_lost_steps_total", ())] == 12
    assert found[("trainyard_recovery_seconds_count", ())] == 1
    assert found[("trainyard_recovery_seconds_sum", ())] == 4.5


def test_checkpoints_that_were_passed_over_and_deletions_are_counted_once() -> None:
    metrics = Metrics()
    begun = {"startTime": "x", "tries": 1}
    versions = [
        run("a", attempts=[{"attempt": 2, "passedOver": ""}]),
        run("a", attempts=[{"attempt": 2, "passedOver": "a shard is truncated"}]),
        run("a", attempts=[{"attempt": 2, "passedOver": "a shard is truncated"}], cleanup=begun),
        run("a", cleanup={**begun, "result": "LeftBehind"}),
        run("a", cleanup={**begun, "result": "LeftBehind", "message": "x"}),
    ]
    for old, new in itertools.pairwise(versions):
        count_changes(metrics, old, new)
    assert samples(metrics) == {
        ("trainyard_checkpoints_passed_over_total", ()): 1,
        ("trainyard_checkpoint_deletions_total", ("LeftBehind",)): 1,
    }


def test_each_commit_is_counted_once_whoever_tells_of_it() -> None:
    metrics = Metrics()
    meter = CommitMeter(metrics, lambda uid: {"old": 7}[uid])
    meter.heard("old", Checkpoint(step=7, seq=7, uri="", time=0.0))
    assert samples(metrics) == {}, "it was counted by the process before"
    full = Checkpoint(
        step=8, seq=8, uri="", time=0.0, reason="auto", bytes=1000, upload_seconds=2.5, stall_seconds=0.25
    )
    for _ in range(3):
        meter.heard("old", full)
    meter.heard("old", Checkpoint(step=7, seq=7, uri="", time=0.0))
    meter.heard("old", Checkpoint(step=9, seq=10, uri="", time=0.0, reason="by {injection}"))
    found = samples(metrics)
    assert found[("trainyard_checkpoints_committed_total", ("auto",))] == 1
    assert found[("trainyard_checkpoints_committed_total", ("other",))] == 1
    assert found[("trainyard_checkpoint_bytes_total", ())] == 1000
    assert found[("trainyard_checkpoint_upload_seconds_sum", ())] == 2.5
    assert found[("trainyard_checkpoint_stall_seconds_sum", ())] == 0.25
    assert found[("trainyard_checkpoint_stall_seconds_count", ())] == 1
    meter.forget("old")
    meter.heard("old", full)
    assert samples(metrics)[("trainyard_checkpoints_committed_total", ("auto",))] == 2, (
        "another run of the UID"
    )


def test_nonsense_of_an_agent_is_not_counted() -> None:
    metrics = Metrics()
    meter = CommitMeter(metrics, lambda uid: 0)
    odd = Checkpoint(
        step=1, seq=1, uri="", time=0.0, bytes=-5, upload_seconds=float("nan"), stall_seconds=float("inf")
    )
    meter.heard("a", odd)
    assert samples(metrics) == {("trainyard_checkpoints_committed_total", ("other",)): 1}
