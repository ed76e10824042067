"""What the coordinator asks of the cluster, answered from the operator's caches."""

from __future__ import annotations

from collections.abc import Callable

from trainyard_operator.kube.store import Store, controller_uid


class CachedFleet:
    """Implements `coordinator.server.Fleet` over the stores of runs and pods."""

    def __init__(self, *, runs: Store, pods: Store, serving: Callable[[], bool]) -> None:
        self._runs = runs
        self._pods = pods
        self._serving = serving

    def serving(self) -> bool:
        return self._serving()

    def run_exists(self, run_uid: str) -> bool:
        return self._runs.by_uid(run_uid) is not None

    def owner_of(self, pod_uid: str) -> str | None:
        """By the ownerReference with `controller: true`; labels are for people."""
        pod = self._pods.by_uid(pod_uid)
        return None if pod is None else controller_uid(pod) or ""
