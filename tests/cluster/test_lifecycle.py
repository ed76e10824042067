"""Suspend, resume, delete, deadline, TTL, a node cut off."""

from __future__ import annotations

import time

import pytest

from devcluster.scenario import Scenario
from tests.cluster.runs import ARGS, at_step, complete, final_sha


def _all_pods(scenario: Scenario) -> list[str]:
    return [p["metadata"]["name"] for p in scenario.kubectl.json("-n", scenario.namespace, "pods")["items"]]


@pytest.mark.timeout(400)
def test_suspend_frees_the_pods_and_resume_goes_on(scenario: Scenario) -> None:
    scenario.submit("nap", scenario.spec(args=ARGS))
    at_step(scenario, "nap", 30)
    scenario.patch("nap", {"spec": {"suspend": True}})
    status = scenario.wait("nap", "Suspended", lambda s: s.get("phase") == "Suspended", seconds=60)
    assert _all_pods(scenario) == [], "Suspended was said with pods still there"
    assert scenario.condition(status, "Suspended")["status"] == "True"
    scenario.patch("nap", {"spec": {"suspend": False}})
    status = complete(scenario, "nap")
    assert status["attempt"] == 2
    assert status["attempts"][-1]["resumedStep"] >= 20, "the checkpoint was not used"
    assert not any(status.get("restarts", {}).values()), "a suspension is no failure"
    final_sha(scenario, "nap")


@pytest.mark.timeout(200)
def test_delete_leaves_nothing(scenario: Scenario) -> None:
    def objects() -> set[str]:
        kinds = (
            "pods,services,configmaps,secrets,persistentvolumeclaims,leases,serviceaccounts,networkpolicies"
        )
        out = scenario.kubectl("-n", scenario.namespace, "get", kinds, "-o", "name")
        return set(out.split())

    before = objects()
    scenario.submit("gone", scenario.spec(args=ARGS))
    at_step(scenario, "gone", 10)
    scenario.kubectl("-n", scenario.namespace, "delete", "tr", "gone", "--timeout=30s")
    end = time.monotonic() + 60
    while objects() != before and time.monotonic() < end:
        time.sleep(0.5)
    assert objects() == before


@pytest.mark.timeout(200)
def test_active_deadline_fails_the_run(scenario: Scenario) -> None:
    scenario.submit("late", scenario.spec(args=ARGS, activeDeadlineSeconds=8))
    status = scenario.wait("late", "Failed", lambda s: s.get("phase") == "Failed", seconds=60)
    assert scenario.condition(status, "Failed")["reason"] == "DeadlineExceeded"


@pytest.mark.timeout(200)
def test_ttl_deletes_the_finished_run(scenario: Scenario) -> None:
    args = ["--epochs", "1", "--batch-size", "64"]
    scenario.submit("brief", scenario.spec(args=args, processes=1, ttlSecondsAfterFinished=5))
    end = time.monotonic() + 120
    while scenario.kubectl.find("-n", scenario.namespace, "tr", "brief") and time.monotonic() < end:
        time.sleep(0.5)
    assert scenario.kubectl.find("-n", scenario.namespace, "tr", "brief") is None


@pytest.mark.timeout(400)
def test_a_run_of_another_controller_is_left_alone(scenario: Scenario) -> None:
    scenario.submit("theirs", scenario.spec(args=ARGS, managedBy="example.com/other"))
    time.sleep(5)
    assert "status" not in scenario.run("theirs")
    assert _all_pods(scenario) == []


@pytest.mark.timeout(400)
def test_a_node_that_is_cut_off_is_replaced_and_its_zombie_stays_out(scenario: Scenario) -> None:
    if scenario.env.cluster is None:
        pytest.skip("a node of an existing cluster cannot be cut off from here")
    cluster = scenario.env.cluster
    spec = scenario.spec(args=[*ARGS, "--step-delay", "0.1"], processes=1)
    spec["tolerations"] = [
        {
            "key": f"node.kubernetes.io/{taint}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": 2,
        }
        for taint in ("unreachable", "not-ready")
    ]
    spec["affinity"] = {
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 100,
                    "podAffinityTerm": {
                        "topologyKey": "kubernetes.io/hostname",
                        "labelSelector": {"matchLabels": {"trainyard.dev/run": "cut"}},
                    },
                }
            ]
        }
    }
    scenario.submit("cut", spec)
    at_step(scenario, "cut", 10)
    pods = scenario.pods("cut")
    operator_node = scenario.kubectl.json("-n", "trainyard-system", "pods")["items"][0]["spec"]["nodeName"]
    index = next((i for i, p in pods.items() if p["node"] != operator_node), None)
    assert index is not None, f"both pods are on the operator's node: {pods}"
    node = pods[index]["node"]
    cluster.cut(node)
    try:
        status = scenario.wait(
            "cut",
            "a new attempt that trains",
            lambda s: s["attempt"] >= 2 and bool(s["attempts"][-1].get("firstStepTime")),
            seconds=150,
        )
        assert status["attempts"][-2]["cause"]["class"] == "infrastructure"
    finally:
        cluster.join(node)
    status = complete(scenario, "cut")
    final_sha(scenario, "cut")
