"""The newest value of each metric as a Prometheus gauge: on a port, in a textfile for node_exporter, or in a registry.

Ours; Lightning has nothing like it. For alerts and dashboards beside the cluster's own metrics, not for curves.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException
from trainyard.loggers.base import Logger
from trainyard.loggers.extras import require
from trainyard.loggers.ranks import is_rank_zero, rank_zero_experiment, rank_zero_only
from trainyard.loggers.values import number
from trainyard_api.contract import Env

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Gauge

_log = logging.getLogger("trainyard")

_OWN = {
    "step": "Optimizer step of the newest values, counted from 0.",
    "metrics_dropped": "Names that were not exported because there are too many.",
    "last_flush_timestamp_seconds": "When values were logged last.",
}
"""Gauges of the logger itself."""


class PrometheusLogger(Logger):
    """Gauges `<namespace>_<metric>`, with `labels` on each.

    `port`: serve them (0: any free one; `addr` None is all interfaces inside a TrainingRun, else loopback).
    `textfile`: write them at each flush, whole or not at all; the name must end in .prom. `registry`: put them into
    that one; with none of the three, into prometheus_client's own. Beyond `max_metrics` names, further ones are
    counted in `<namespace>_metrics_dropped` only. Raises ModuleNotFoundError, MisconfigurationException.
    """

    def __init__(
        self, port: int | None = None, *, addr: str | None = None, textfile: str | Path | None = None,
        registry: CollectorRegistry | None = None, namespace: str = "trainyard", prefix: str = "",
        labels: Mapping[str, str] | None = None, max_metrics: int = 200,
    ) -> None:  # fmt: skip
        require("prometheus_client", "prometheus", "PrometheusLogger")
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", namespace):
            raise MisconfigurationException(f"namespace: {namespace!r} is no Prometheus name")
        if textfile is not None and Path(textfile).suffix != ".prom":
            raise MisconfigurationException(
                f"textfile: {textfile} does not end in .prom, so nobody would read it"
            )
        for label in labels or {}:
            if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_]*", label):
                raise MisconfigurationException(f"labels: {label!r} is no Prometheus label")
        everywhere = "0.0.0.0" if os.environ.get(Env.RUN_UID) else "127.0.0.1"  # noqa: S104 - scraped from outside
        self._wanted_port, self._addr = port, everywhere if addr is None else addr
        self._textfile = None if textfile is None else Path(textfile)
        self._given_registry = registry
        self._namespace, self._prefix = namespace, prefix
        self._labels = {str(k): str(v) for k, v in (labels or {}).items()}
        self._max_metrics = max_metrics
        self._start_over()

    def _start_over(self) -> None:
        self._registry: CollectorRegistry | None = None
        self._gauges: dict[str, Gauge] = {}
        """By the name under which a value was logged."""
        self._own: dict[str, Gauge] = {}
        self._taken = set(_OWN)
        self._dropped: set[str] = set()
        self._server: Any = None
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned: gauges and server are made where they are used."""
        fresh = object.__new__(type(self))
        fresh._start_over()
        return {**self.__dict__, "_given_registry": None, **fresh.__dict__}

    # ---- where it can be read

    @property
    def port(self) -> int | None:
        """On which it serves, once it does."""
        return None if self._server is None else int(self._server.server_port)

    @property
    @rank_zero_experiment
    def experiment(self) -> CollectorRegistry:
        """For metrics of your own. Raises OSError when the port is taken."""
        if self._registry is None:
            import prometheus_client as client

            registry = self._given_registry
            if registry is None:
                separate = self._wanted_port is not None or self._textfile is not None
                registry = client.CollectorRegistry() if separate else client.REGISTRY
            if self._wanted_port is not None:
                self._server, self._thread = client.start_http_server(self._wanted_port, self._addr, registry)
            self._registry = registry
        return self._registry

    # ---- what is logged

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers and tensors of one element. Raises ValueError, OSError."""
        values = {name: number(value) for name, value in metrics.items()}
        for name, value in values.items():
            gauge = self._gauge_of(self._prefix + ("_" if self._prefix else "") + name)
            if gauge is not None:
                self._child(gauge).set(value)
        if step is not None:
            self._set_own("step", step)
        self._set_own("metrics_dropped", len(self._dropped))
        self._set_own("last_flush_timestamp_seconds", time.time())
        self.save()

    def _gauge_of(self, name: str) -> Gauge | None:
        """None beyond the limit."""
        gauge = self._gauges.get(name)
        if gauge is None and name not in self._dropped:
            if len(self._gauges) >= self._max_metrics:
                if not self._dropped:
                    _log.warning(
                        "PrometheusLogger: %r is left out, and all further names: there are %d (max_metrics) already",
                        name, self._max_metrics,
                    )  # fmt: skip
                if len(self._dropped) < 10 * self._max_metrics:  # must not grow for ever either
                    self._dropped.add(name)
                return None
            gauge = self._gauges[name] = self._make(self._free_name(name), f"Logged as {name}.")
        return gauge

    def _free_name(self, name: str) -> str:
        """`val/loss` becomes val_loss; val_loss_2 if somebody also logs `val_loss`, or this logger has that name."""
        clean = re.sub(r"[^a-zA-Z0-9_]+", "_", name).strip("_") or "metric"
        count, found = 1, clean
        while found in self._taken:
            count += 1
            found = f"{clean}_{count}"
        self._taken.add(found)
        return found

    def _set_own(self, name: str, value: float) -> None:
        if name not in self._own:
            self._own[name] = self._make(name, _OWN[name])
        self._child(self._own[name]).set(value)

    def _make(self, name: str, text: str) -> Gauge:
        from prometheus_client import Gauge

        return Gauge(
            name, text, labelnames=list(self._labels), namespace=self._namespace, registry=self.experiment
        )

    def _child(self, gauge: Gauge) -> Gauge:
        return gauge.labels(**self._labels) if self._labels else gauge

    # ---- the end

    @rank_zero_only
    def save(self) -> None:
        """The textfile."""
        if self._textfile is not None and self._registry is not None:
            from prometheus_client import write_to_textfile

            self._textfile.parent.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(self._textfile), self._registry)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Serves on after a success, until the process ends, so that the last values are scraped."""
        self.save()
        if status == "failed":
            self.close()

    def close(self) -> None:
        """Ends the server and takes the gauges out of the registry."""
        if not is_rank_zero() or self._registry is None:
            return
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._thread is not None:
            self._thread.join(5)
        for gauge in [*self._gauges.values(), *self._own.values()]:
            self._registry.unregister(gauge)
        self._start_over()
