"""Every Prometheus object of the operator. docs/metrics.md is generated from here.

Names are controller-runtime's where it has them, so that existing dashboards and alerts work. No counter
has a label that grows with the number of runs; what is said of a single run comes from the live cache at the
time of the scrape (`collectors.py`), so it is gone when the run is.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Seconds; for what happens inside the operator."""
RECOVERY = (0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Seconds; for what people wait for."""
UPLOAD = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
"""Seconds; for transfers."""
CONTROLLER = "trainingrun"
"""Value of controller-runtime's labels `controller` and `name`."""


@dataclass(frozen=True, slots=True)
class Described:
    """What docs/metrics.md says of one metric."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


class Metrics:
    """All metrics, in a registry of their own (so that tests, and two apps in a process, do not collide)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.described: list[Described] = []
        name = ("name",)
        # ---- work queue and reconcile: names of controller-runtime
        self.queue_depth = self._gauge("workqueue_depth", "Runs that wait to be reconciled.", name)
        self.queue_adds = self._counter("workqueue_adds_total", "Runs put into the work queue.", name)
        self.queue_retries = self._counter("workqueue_retries_total", "Runs retried after an error.", name)
        self.queue_wait = self._histogram(
            "workqueue_queue_duration_seconds", "Time from being due to being worked on.", FAST, name
        )
        self.queue_work = self._histogram(
            "workqueue_work_duration_seconds", "Time to work on one run.", FAST, name
        )
        self.queue_longest = self._gauge(
            "workqueue_longest_running_processor_seconds", "Age of the oldest reconcile in progress.", name
        )
        controller = ("controller",)
        self.reconciles = self._counter(
            "controller_runtime_reconcile_total",
            "Reconciles by result: success, requeue (the object had changed meanwhile) or error.",
            (*controller, "result"),
        )
        self.reconcile_seconds = self._histogram(
            "controller_runtime_reconcile_time_seconds", "Duration of a reconcile.", FAST, controller
        )
        self.workers = self._gauge(
            "controller_runtime_max_concurrent_reconciles", "Reconcile workers.", controller
        )
        # ---- API server and caches
        self.api_requests = self._counter(
            "trainyard_api_requests_total",
            "Requests to the API server; code is error when no answer came.",
            ("verb", "resource", "code"),
        )
        self.api_seconds = self._histogram(
            "trainyard_api_request_duration_seconds",
            "Duration of requests to the API server (of a watch: until its first byte).",
            FAST,
            ("verb", "resource"),
        )
        # ---- process
        self.loop_lag = self._histogram(
            "trainyard_loop_lag_seconds",
            "How late the event loop ran a timer; a blocked loop shows here.",
            FAST,
        )
        self.leader = self._gauge("trainyard_leader", "1 if this process holds the lease.")
        # ---- coordinator
        self.beats = self._counter(
            "trainyard_beats_total", "Beats of agents by the HTTP status they were answered with.", ("code",)
        )
        self.token_reviews = self._counter(
            "trainyard_token_reviews_total", "TokenReviews: accepted, refused or error.", ("result",)
        )
        # ---- runs
        self.restarts = self._counter(
            "trainyard_restarts_total",
            "Attempts that failed, by failure class and reason, seen by this process.",
            ("class", "reason"),
        )
        self.recovery = self._histogram(
            "trainyard_recovery_seconds",
            "From a failure to the first new step of the next attempt.",
            RECOVERY,
        )
        self.lost_steps = self._counter(
            "trainyard_lost_steps_total", "Optimizer steps that had to be taken again after failures."
        )
        # ---- checkpoints
        self.commits = self._counter(
            "trainyard_checkpoints_committed_total",
            "Checkpoints that agents reported as committed, by what they were made for.",
            ("reason",),
        )
        self.commit_bytes = self._counter(
            "trainyard_checkpoint_bytes_total", "Bytes of those checkpoints, where the agents tell."
        )
        self.upload_seconds = self._histogram(
            "trainyard_checkpoint_upload_seconds",
            "From the first byte of an upload to its commit, where the agents tell.",
            UPLOAD,
        )
        self.stall_seconds = self._histogram(
            "trainyard_checkpoint_stall_seconds",
            "How long training stood still for a checkpoint, where the agents tell.",
            FAST,
        )
        self.passed_over = self._counter(
            "trainyard_checkpoints_passed_over_total",
            "Attempts that started from an older checkpoint because newer ones were missing, truncated or altered.",
        )
        self.cleanups = self._counter(
            "trainyard_checkpoint_deletions_total",
            "Runs with deletionPolicy Delete that were deleted: with their checkpoints (Deleted), or not (LeftBehind).",
            ("result",),
        )

    def queue(self) -> QueueMeter:
        """What a `WorkQueue` reports to."""
        return QueueMeter(self)

    def api_request(self, verb: str, resource: str, code: str, seconds: float) -> None:
        """A `kube.session.Observer`."""
        self.api_requests.labels(verb, resource, code).inc()
        self.api_seconds.labels(verb, resource).observe(seconds)

    def reconciled(self, result: str, seconds: float) -> None:
        """One reconcile ended: success, requeue or error."""
        self.reconciles.labels(CONTROLLER, result).inc()
        self.reconcile_seconds.labels(CONTROLLER).observe(seconds)

    def _note(self, name: str, kind: str, text: str, labels: tuple[str, ...]) -> None:
        self.described.append(Described(name, kind, labels, text))

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        self._note(name, "counter", text, labels)
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        self._note(name, "gauge", text, labels)
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        self._note(name, "histogram", text, labels)
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class QueueMeter:
    """Implements `workqueue.QueueMetrics`."""

    def __init__(self, metrics: Metrics) -> None:
        self._depth = metrics.queue_depth.labels(CONTROLLER)
        self._adds = metrics.queue_adds.labels(CONTROLLER)
        self._retries = metrics.queue_retries.labels(CONTROLLER)
        self._wait = metrics.queue_wait.labels(CONTROLLER)
        self._work = metrics.queue_work.labels(CONTROLLER)

    def depth(self, count: int) -> None:
        self._depth.set(count)

    def added(self) -> None:
        self._adds.inc()

    def retried(self) -> None:
        self._retries.inc()

    def queued(self, seconds: float) -> None:
        self._wait.observe(seconds)

    def worked(self, seconds: float) -> None:
        self._work.observe(seconds)
