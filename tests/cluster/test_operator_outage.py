"""The operator is not on the training's critical path."""

from __future__ import annotations

import re
import time

import pytest

from devcluster.install import DEPLOYMENT, NAMESPACE
from devcluster.scenario import Scenario
from tests.cluster.audit import writes
from tests.cluster.runs import ARGS, at_step, complete, final_sha

PROCESSES = 2
STEP = re.compile(r"\bstep (\d+)/\d+")


@pytest.mark.timeout(600)
def test_training_goes_on_and_a_failure_meanwhile_is_repaired(scenario: Scenario) -> None:
    scenario.submit("outage", scenario.spec(args=[*ARGS, "--step-delay", "0.15"], processes=PROCESSES))
    at_step(scenario, "outage", 10)
    pods = scenario.pods("outage")
    try:
        _scale(scenario, 0)
        before = _newest_step(scenario)
        time.sleep(5)
        assert _newest_step(scenario) > before, "training stopped with the operator"
        scenario.kill_rank("outage", 1, per_node=PROCESSES)
    finally:
        _scale(scenario, 1)
    scenario.wait(
        "outage",
        "recovery of what failed while the operator was away",
        lambda s: s["attempt"] == 2 and bool(s["attempts"][-1].get("firstStepTime")),
        seconds=60,
    )
    assert {p["uid"] for p in scenario.pods("outage").values()} == {p["uid"] for p in pods.values()}
    complete(scenario, "outage")
    final_sha(scenario, "outage")


@pytest.mark.timeout(600)
def test_operator_killed_at_any_time_costs_the_run_nothing(scenario: Scenario) -> None:
    scenario.submit("killed", scenario.spec(args=ARGS, processes=PROCESSES))
    for _ in range(4):  # while pods are created, while the gang forms, while it trains
        time.sleep(2.5)
        scenario.kubectl(
            "-n",
            NAMESPACE,
            "delete",
            "pod",
            scenario.operator_pod(),
            "--force",
            "--grace-period=0",
            "--wait=false",
        )
    status = complete(scenario, "killed")
    assert status["attempt"] == 1, "the operator's death was taken for the run's"
    final_sha(scenario, "killed")


@pytest.mark.timeout(600)
def test_nothing_is_written_once_all_is_said(scenario: Scenario) -> None:
    if scenario.env.cluster is None:
        pytest.skip("an existing cluster's audit log cannot be read from here")
    audit_log = scenario.env.cluster.audit_log
    scenario.submit("quiet", scenario.spec(args=["--epochs", "1", "--batch-size", "64"], processes=1))
    complete(scenario, "quiet")
    # The agents' exit changes the pods (kubelet's writes); Events are posted behind the status.
    time.sleep(5)
    began = time.time()
    time.sleep(60)
    assert writes(audit_log, since=began) == []
    scenario.kubectl("-n", NAMESPACE, "delete", "pod", scenario.operator_pod(), "--wait=false")
    began = time.time()
    scenario.kubectl("-n", NAMESPACE, "rollout", "status", f"deployment/{DEPLOYMENT}", "--timeout=60s")
    time.sleep(20)
    assert writes(audit_log, since=began) == []


def _scale(scenario: Scenario, replicas: int) -> None:
    scenario.kubectl("-n", NAMESPACE, "scale", f"deployment/{DEPLOYMENT}", f"--replicas={replicas}")
    if replicas:
        scenario.kubectl(
            "-n", NAMESPACE, "rollout", "status", f"deployment/{DEPLOYMENT}", "--timeout=90s", seconds=100
        )
    else:
        scenario.kubectl(
            "-n", NAMESPACE, "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/component=operator",
            "--timeout=60s", seconds=70,
        )  # fmt: skip


def _newest_step(scenario: Scenario) -> int:
    """From the pod's log: the operator is away, the status stands still."""
    steps = [int(n) for n in STEP.findall(scenario.logs("outage", 0, tail=40))]
    assert steps, "no progress line in the log"
    return steps[-1]
