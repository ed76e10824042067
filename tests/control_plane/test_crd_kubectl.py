"""What people see: kubectl explain, get, apply, wait; and that the examples are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from devcluster.cluster import ControlPlane
from devcluster.proc import CommandError
from tests.control_plane.manifests import training_run
from tests.control_plane.server import RUNS, Server

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((REPOSITORY / "examples").glob("**/*.yaml"))
STATUS = {
    "phase": "Running",
    "attempt": 3,
    "nodes": {"desired": 2, "ready": 2, "summary": "2/2"},
    "step": 120,
    "progress": "40%",
    "restarts": {"user": 1, "infrastructure": 7, "withoutProgress": 0},
    "checkpoint": {"step": 100, "seq": 4, "uri": "s3://bucket/runs/u/commits/00000004.json"},
    "conditions": [
        {"type": "Complete", "status": "False", "reason": "Created", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"},
        {"type": "Running", "status": "True", "reason": "Training", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"},
    ],
}  # fmt: skip


@pytest.fixture
def runs(namespace: str, server: Server) -> str:
    """A namespace with the run `digits`, which trains, and `other`, which has no status yet."""
    path = RUNS.format(namespace=namespace)
    server.create(path, training_run())
    server.create(path, training_run(name="other"))
    answer = server.request("PATCH", f"{path}/digits/status", {"status": STATUS})
    assert answer.code == 200, answer.message
    return namespace


def table(text: str) -> dict[str, list[str]]:
    """Rows of `kubectl get` by their first column."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_columns(control_plane: ControlPlane, runs: str) -> None:
    rows = table(control_plane.kubectl("-n", runs, "get", "tr"))
    assert rows["NAME"] == ["PHASE", "NODES", "ATTEMPT", "STEP", "PROGRESS", "AGE"]
    assert rows["digits"][:5] == ["Running", "2/2", "3", "120", "40%"]
    assert len(rows["other"]) == 1, "only an age: nothing is known of it yet"


def test_wide_columns(control_plane: ControlPlane, runs: str) -> None:
    rows = table(control_plane.kubectl("-n", runs, "get", "tr", "-o", "wide"))
    assert rows["NAME"][6:] == ["RESTARTS", "INFRA-RESTARTS", "CHECKPOINT", "IMAGE", "REASON"]
    assert rows["digits"][6:] == ["1", "7", "100", "registry.example/trainer:1", "Training"]


@pytest.mark.parametrize("name", ["tr", "trainingrun", "trainingruns", "trainyard"])
def test_names(control_plane: ControlPlane, runs: str, name: str) -> None:
    found = control_plane.kubectl("-n", runs, "get", name, "-o", "name")
    assert found.split() == ["trainingrun.trainyard.dev/digits", "trainingrun.trainyard.dev/other"]


def test_runs_are_among_all(control_plane: ControlPlane, runs: str) -> None:
    assert "trainingrun.trainyard.dev/digits" in control_plane.kubectl("-n", runs, "get", "all", "-o", "name")


def test_field_selector(control_plane: ControlPlane, runs: str) -> None:
    found = control_plane.kubectl(
        "-n", runs, "get", "tr", "--field-selector=status.phase=Running", "-o", "name"
    )
    assert found.split() == ["trainingrun.trainyard.dev/digits"]
    found = control_plane.kubectl(
        "-n", runs, "get", "tr", "--field-selector=status.phase!=Running", "-o", "name"
    )
    assert found.split() == ["trainingrun.trainyard.dev/other"]


def test_wait_for_a_condition_and_for_a_phase(control_plane: ControlPlane, runs: str) -> None:
    control_plane.kubectl("-n", runs, "wait", "--for=condition=Running", "tr/digits", "--timeout=5s")
    control_plane.kubectl(
        "-n", runs, "wait", "--for=jsonpath={.status.phase}=Running", "tr/digits", "--timeout=5s"
    )


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("tr", ["spec", "-required-", "does not lose work"]),
        ("tr.spec", ["checkpoint", "restartPolicy", "processesPerNode", "create a new run"]),
        ("tr.spec.checkpoint", ["uri", "credentialsSecret", "file:///absolute/path"]),
        ("tr.spec.restartPolicy.noProgressLimit", ["in a row"]),
        ("tr.spec.imagePullPolicy", ["ENUM: Always IfNotPresent Never"]),
        ("tr.status", ["phase", "attempts", "Only the operator writes it"]),
        ("tr.status.attempts.cause", ["class", "exitCode"]),
    ],
)
def test_explain(control_plane: ControlPlane, path: str, texts: list[str]) -> None:
    words = " ".join(control_plane.kubectl("explain", path).split())
    assert [text for text in texts if text not in words] == []


def test_apply_refuses_a_typo(control_plane: ControlPlane, namespace: str) -> None:
    run = training_run({"spec.processPerNode": 2})
    with pytest.raises(CommandError, match=r'unknown field "spec\.processPerNode"'):
        control_plane.kubectl("-n", namespace, "apply", "-f", "-", text=json.dumps(run))


def test_server_side_apply_merges_env_by_name(control_plane: ControlPlane, namespace: str) -> None:
    """List types: two managers that each own a variable do not remove each other's. Only on creation, as env is fixed."""
    run = training_run({"spec.env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]})
    apply = ("-n", namespace, "apply", "--server-side", "-f", "-")
    control_plane.kubectl(*apply, "--field-manager=one", text=json.dumps(run))
    part = training_run({"spec.env": [{"name": "B", "value": "2"}]})
    control_plane.kubectl(*apply, "--field-manager=two", text=json.dumps(part))
    stored = json.loads(control_plane.kubectl("-n", namespace, "get", "tr", "digits", "-o", "json"))
    assert [v["name"] for v in stored["spec"]["env"]] == ["A", "B"]
    assert stored["metadata"]["generation"] == 1


def test_client_side_apply_of_the_crd_fits_its_annotation(control_plane: ControlPlane) -> None:
    crd = REPOSITORY / "crds" / "trainyard.dev_trainingruns.yaml"
    assert "trainingruns.trainyard.dev" in control_plane.kubectl("apply", "-f", crd)


def test_there_are_examples() -> None:
    assert REPOSITORY / "examples" / "minimal.yaml" in EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_examples_are_accepted(control_plane: ControlPlane, namespace: str, example: Path) -> None:
    out = control_plane.kubectl(
        "-n", namespace, "apply", "--dry-run=server", "--validate=strict", "-f", example
    )
    assert "trainingrun.trainyard.dev/" in out


def test_the_program_in_the_minimal_example_is_python() -> None:
    config_map, run = yaml.safe_load_all(
        (REPOSITORY / "examples" / "minimal.yaml").read_text(encoding="utf-8")
    )
    assert run["spec"]["script"]["configMap"]["name"] == config_map["metadata"]["name"]
    compile(config_map["data"]["train.py"], "train.py", "exec")
