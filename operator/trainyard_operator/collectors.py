"""Metrics that are read from live state at each scrape, and counters fed by what changes in a status."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trainyard_api.contract import ConditionType, Phase
from trainyard_operator.kube.api import Object
from trainyard_operator.metrics import Metrics

RUN_LABELS = ("namespace", "run")
PER_RUN = {
    "trainyard_run_attempt": ("Current attempt of an unfinished run.", "attempt"),
    "trainyard_run_step": ("Newest optimizer step in the status of an unfinished run.", "step"),
    "trainyard_run_checkpoint_step": ("Newest committed step of an unfinished run.", "checkpoint.step"),
    "trainyard_run_nodes_ready": ("Pods of an unfinished run whose agent is alive and warm.", "nodes.ready"),
    "trainyard_run_nodes_desired": ("Pods that an unfinished run wants.", "nodes.desired"),
}
"""Name -> (help text, path in the status)."""
FLEET = {
    "trainyard_runs": ("TrainingRuns by phase.", ("phase",)),
    "trainyard_agents_connected": ("Agents heard within their time to live.", ()),
}


def finished(run: Object) -> bool:
    """Complete or Failed, read from a raw object."""
    return any(
        c.get("type") in (ConditionType.COMPLETE, ConditionType.FAILED) and c.get("status") == "True"
        for c in (run.get("status") or {}).get("conditions") or ()
    )


class RunsCollector(Collector):
    """One series a run and gauge, for unfinished runs only: what is over is in the status, not in metrics."""

    def __init__(self, runs: Callable[[], Iterable[Object]], agents: Callable[[], int]) -> None:
        self._runs = runs
        self._agents = agents

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Without samples; prometheus_client asks at registration so that `collect` need not run then."""
        fleet = [GaugeMetricFamily(n, text, labels=labels) for n, (text, labels) in FLEET.items()]
        return [*fleet, *(GaugeMetricFamily(n, text, labels=RUN_LABELS) for n, (text, _) in PER_RUN.items())]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        phases, agents, *gauges = self.describe()
        tally: Tally[str] = Tally({str(phase): 0 for phase in Phase})
        for run in self._runs():
            status = run.get("status") or {}
            tally[str(status.get("phase") or Phase.PENDING)] += 1
            if not finished(run):
                labels = [run["metadata"].get("namespace", ""), run["metadata"]["name"]]
                for gauge, (_, path) in zip(gauges, PER_RUN.values(), strict=True):
                    value = _number(status, path)
                    if value is not None:
                        gauge.add_metric(labels, value)
        for phase, count in tally.items():
            phases.add_metric([phase], count)
        agents.add_metric([], self._agents())
        yield from (phases, agents, *gauges)


def _number(status: Any, path: str) -> float | None:
    for key in path.split("."):
        status = status.get(key) if isinstance(status, dict) else None
    return float(status) if isinstance(status, int | float) else None


@dataclass(frozen=True, slots=True)
class Watched:
    """State of the watches of one resource (one for each namespace, if not all are watched)."""

    objects: int
    last_heard: float
    """Unix seconds of the last event, bookmark or list; of the quietest watch."""
    restarts: Mapping[str, int]
    """By reason."""


@dataclass(frozen=True, slots=True)
class Internals:
    """What `InternalsCollector` shows."""

    watched: Mapping[str, Watched]
    """By resource."""
    events: Mapping[str, int]
    """By result: posted, aggregated, dropped, failed."""
    kopf_starts: int


INTERNALS = {
    "trainyard_cache_objects": ("gauge", "Objects in a cache.", ("resource",)),
    "trainyard_watch_last_event_timestamp_seconds": (
        "gauge",
        "Unix time of the last event, bookmark or list of a resource's quietest watch.",
        ("resource",),
    ),
    "trainyard_watch_restarts_total": ("counter", "Watches that ended, by reason.", ("resource", "reason")),
    "trainyard_events_total": (
        "counter",
        "Kubernetes Events: posted, aggregated into a series, dropped (the buffer was full) or failed.",
        ("result",),
    ),
    "trainyard_kopf_starts_total": ("counter", "Starts of kopf; more than one means that it failed.", ()),
}
"""Name -> (type, help text, labels)."""


class InternalsCollector(Collector):
    """Caches, watches, Events and kopf: their own counters, without a second copy of them."""

    def __init__(self, internals: Callable[[], Internals]) -> None:
        self._internals = internals

    def describe(self) -> list[GaugeMetricFamily | CounterMetricFamily]:
        """Without samples."""
        return [
            (GaugeMetricFamily if kind == "gauge" else CounterMetricFamily)(name, text, labels=labels)
            for name, (kind, text, labels) in INTERNALS.items()
        ]

    def collect(self) -> Iterator[Metric]:
        now = self._internals()
        objects, heard, restarts, events, kopf = self.describe()
        for resource, watched in now.watched.items():
            objects.add_metric([resource], watched.objects)
            heard.add_metric([resource], watched.last_heard)
            for reason, count in watched.restarts.items():
                restarts.add_metric([resource, reason], count)
        for result, count in now.events.items():
            events.add_metric([result], count)
        kopf.add_metric([], now.kopf_starts)
        yield from (objects, heard, restarts, events, kopf)


def count_changes(metrics: Metrics, old: Object | None, new: Object) -> None:
    """Counts what the newer version of a run adds to its history (`status.attempts`, `status.cleanup`).

    Call it for each version once, in order, and only in the leader: the sum over replicas is then right. With
    no older version nothing is counted, because it was counted by the process before.
    """
    if old is None:
        return
    before = {a["attempt"]: a for a in _attempts(old)}
    for entry in _attempts(new):
        known = before.get(entry["attempt"], {})
        cause = entry.get("cause")
        if cause and not known.get("cause"):
            metrics.restarts.labels(str(cause.get("class", "")), str(cause.get("reason", ""))).inc()
        if entry.get("recoverySeconds") is not None and known.get("recoverySeconds") is None:
            metrics.recovery.observe(entry["recoverySeconds"])
        if entry.get("lostSteps") is not None and known.get("lostSteps") is None:
            metrics.lost_steps.inc(max(entry["lostSteps"], 0))
        if entry.get("passedOver") and not known.get("passedOver"):
            metrics.passed_over.inc()
    result = _cleanup_result(new)
    if result and not _cleanup_result(old):
        metrics.cleanups.labels(result).inc()


def _cleanup_result(run: Object) -> str:
    cleanup = (run.get("status") or {}).get("cleanup") or {}
    return str(cleanup.get("result") or "")


def _attempts(run: Object) -> list[dict[str, Any]]:
    return [a for a in (run.get("status") or {}).get("attempts") or () if "attempt" in a]
