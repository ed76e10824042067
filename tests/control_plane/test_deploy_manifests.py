"""operator/deploy: it installs, its pods pass Pod Security `restricted`, and names fit the code's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster.cluster import ControlPlane
from tests.control_plane.server import Server
from trainyard_operator import settings

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "operator" / "deploy"
SYSTEM = "trainyard-system"
MANIFESTS = sorted(p for p in DEPLOY.glob("*.yaml") if p.name != "kustomization.yaml")


def documents(*kinds: str) -> list[dict[str, Any]]:
    found = [d for file in MANIFESTS for d in yaml.safe_load_all(file.read_text(encoding="utf-8"))]
    return [d for d in found if d["kind"] in kinds or not kinds]


@pytest.fixture(scope="module")
def installed(control_plane: ControlPlane) -> str:
    """Output of an install by `kubectl apply -k`, as the kustomization's head says."""
    return control_plane.kubectl("apply", "-k", DEPLOY)


def test_the_kustomization_has_every_manifest() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text(encoding="utf-8"))
    assert sorted(kustomization["resources"]) == [p.name for p in MANIFESTS]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda p: p.name)
def test_manifests_are_valid(control_plane: ControlPlane, installed: str, manifest: Path) -> None:
    """Strictly, and each file by itself as devcluster/install.py applies them."""
    out = control_plane.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", manifest)
    lines = out.splitlines()
    assert lines and all("(server dry run)" in line for line in lines)


def test_applying_again_changes_nothing(control_plane: ControlPlane, installed: str) -> None:
    assert installed
    out = control_plane.kubectl("apply", "-k", DEPLOY)
    assert all(line.endswith("unchanged") for line in out.splitlines()), out


def test_the_deployment_passes_pod_security(server: Server, installed: str) -> None:
    """Its controller makes the pod: admission of the namespace, which enforces `restricted`, let it through."""
    path = f"/api/v1/namespaces/{SYSTEM}/pods"
    deadline = time.monotonic() + 30
    while not (pods := server.request("GET", path).body["items"]):
        sets = server.request("GET", f"/apis/apps/v1/namespaces/{SYSTEM}/replicasets").body["items"]
        failures = [c["message"] for s in sets for c in s.get("status", {}).get("conditions") or []]
        assert not failures, failures
        assert time.monotonic() < deadline, "the Deployment's pod was not made within 30 s"
        time.sleep(0.05)
    assert pods[0]["spec"]["serviceAccountName"] == "trainyard-operator"


def test_the_deployment_draws_no_warnings(server: Server, installed: str) -> None:
    (deployment,) = documents("Deployment")
    path = f"/apis/apps/v1/namespaces/{SYSTEM}/deployments"
    deployment["metadata"]["name"] = "second"
    answer = server.request("POST", path, deployment, query={"dryRun": "All", "fieldValidation": "Strict"})
    assert (answer.code, answer.warnings) == (201, ())


def test_pod_security_would_have_refused_a_worse_pod(server: Server, installed: str) -> None:
    """That the two tests above mean something."""
    (deployment,) = documents("Deployment")
    pod = {"metadata": {"name": "worse"}, "spec": deployment["spec"]["template"]["spec"]}
    del pod["spec"]["containers"][0]["securityContext"]["capabilities"]
    answer = server.request("POST", f"/api/v1/namespaces/{SYSTEM}/pods", pod, query={"dryRun": "All"})
    assert answer.code == 403
    assert "unrestricted capabilities" in answer.message


def test_nothing_of_the_deployment_is_writable_or_privileged() -> None:
    (deployment,) = documents("Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsNonRoot"]) == (65532, True)
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")} == {"/tmp"}  # noqa: S108


def test_selectors_find_the_pod() -> None:
    (deployment,) = documents("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    ports = {
        p["name"]: p["containerPort"]
        for p in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    for service in documents("Service"):
        assert service["spec"]["selector"].items() <= labels, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]


def test_only_a_ready_operator_is_the_coordinator() -> None:
    """Readiness is leadership: an agent must not reach one that does not lead."""
    services = {s["metadata"]["name"]: s["spec"] for s in documents("Service")}
    assert "publishNotReadyAddresses" not in services["trainyard-coordinator"]


def test_the_deployment_fits_the_operators_settings() -> None:
    """Ports, files and variables are what the operator reads; its own check of the variables accepts them."""
    (deployment,) = documents("Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    values = {e["name"]: e.get("value", "").replace("$(POD_NAMESPACE)", SYSTEM) for e in container["env"]}
    ours = {name: value for name, value in values.items() if name.startswith("TRAINYARD_")}
    assert set(ours) <= {v.env for v in settings.VARIABLES}
    loaded = settings.load(ours)
    assert loaded.lease_namespace == SYSTEM
    (service,) = (s for s in documents("Service") if s["metadata"]["name"] == "trainyard-coordinator")
    assert (
        loaded.coordinator_url
        == f"https://trainyard-coordinator.{SYSTEM}.svc:{service['spec']['ports'][0]['port']}"
    )
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"coordinator": loaded.coordinator_port, "web": loaded.web_port}
    folder = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "tls")
    assert {loaded.coordinator_ca, loaded.coordinator_cert, loaded.coordinator_key} == {
        Path(folder, name) for name in ("ca.crt", "tls.crt", "tls.key")
    }
    (lease,) = (
        rule["resourceNames"][0]
        for role in documents("Role")
        for rule in role["rules"]
        if "resourceNames" in rule
    )
    assert lease == loaded.lease_name
