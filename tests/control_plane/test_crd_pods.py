"""Whatever the CRD accepts, the pod built of it is accepted too, under Pod Security `restricted`.

A value that the schema lets through and the pod's validation does not would only be seen when the run cannot start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from tests.control_plane.manifests import training_run
from tests.control_plane.server import RUNS, Server
from tests.control_plane.test_crd_accepted import ACCEPTED
from trainyard_api.v1alpha1 import Status, TrainingRun
from trainyard_operator.plan.model import PlanSettings
from trainyard_operator.plan.pods import desired_pod

SETTINGS = PlanSettings(coordinator_url="https://coordinator.example:8443", coordinator_ca="a certificate")
DRY_RUN = {"dryRun": "All", "fieldValidation": "Strict"}


@pytest.fixture(scope="module")
def restricted(make_namespace: Callable[..., str], server: Server) -> str:
    """A namespace that enforces Pod Security `restricted`, with what the accepted runs refer to."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    name = make_namespace(**labels)
    server.create(f"/api/v1/namespaces/{name}/serviceaccounts", {"metadata": {"name": "trainer"}})
    classes = "/apis/scheduling.k8s.io/v1/priorityclasses"
    server.create(classes, {"metadata": {"name": "batch.low"}, "value": 10})
    return name


@pytest.mark.parametrize("case", ACCEPTED)
def test_pods_of_accepted_runs_are_accepted(server: Server, restricted: str, case: str) -> None:
    stored = server.create(RUNS.format(namespace=restricted), training_run(ACCEPTED[case]), query=DRY_RUN)
    run = dataclasses.replace(TrainingRun.from_object(stored), status=Status(attempt=1))
    for index in (0, run.spec.nodes.desired - 1):
        pod = desired_pod(run, index, SETTINGS)
        answer = server.request("POST", f"/api/v1/namespaces/{restricted}/pods", pod, query=DRY_RUN)
        assert (answer.code, answer.warnings) == (201, ()), answer.body


def test_the_namespace_does_refuse_pods(server: Server, restricted: str) -> None:
    """That the test above means something."""
    run = TrainingRun.from_object(
        server.create(RUNS.format(namespace=restricted), training_run(), query=DRY_RUN)
    )
    pod = desired_pod(run, 0, SETTINGS)
    pod["spec"]["hostNetwork"] = True
    answer = server.request("POST", f"/api/v1/namespaces/{restricted}/pods", pod, query=DRY_RUN)
    assert answer.code == 403
    assert "host namespaces" in answer.message
