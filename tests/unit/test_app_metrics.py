"""Metrics: what is counted when, that labels stay few, and that docs/metrics.md is up to date."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from trainyard_operator.collectors import Internals, InternalsCollector, RunsCollector, Watched, count_changes
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
