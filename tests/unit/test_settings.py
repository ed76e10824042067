"""Settings: what is given where, and which variable is blamed."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainyard_operator.settings import VARIABLES, Settings, load, pod_namespace


def test_defaults_need_nothing_given() -> None:
    made = load({}, host="Node-1")
    assert made.identity.startswith("node-1-")
    assert made == Settings(
        identity=made.identity,
        lease_namespace="default",
        coordinator_url="https://trainyard-coordinator.default.svc:8443",
    )
    assert load({}).identity != load({}).identity, "two processes of one host are two candidates"


def test_every_variable_is_read_from_the_environment_and_flags_win() -> None:
    env = {
        "TRAINYARD_KUBECONFIG": "/k",
        "TRAINYARD_NAMESPACES": "a, b,a",
        "TRAINYARD_COORDINATOR_BIND": "[::1]:9443",
        "TRAINYARD_COORDINATOR_URL": "https://here:9443/",
        "TRAINYARD_COORDINATOR_CA": "/ca",
        "TRAINYARD_COORDINATOR_CERT": "/cert",
        "TRAINYARD_COORDINATOR_KEY": "/key",
        "TRAINYARD_WEB_BIND": "127.0.0.1:0",
        "TRAINYARD_LEASE_NAMESPACE": "system",
        "TRAINYARD_LEASE_NAME": "mine",
        "TRAINYARD_LEASE_DURATION": "6",
        "TRAINYARD_IDENTITY": "me",
        "TRAINYARD_WORKERS": "3",
        "TRAINYARD_RESYNC_SECONDS": "60",
        "TRAINYARD_AGENT_TTL": "5.5",
        "TRAINYARD_STATUS_INTERVAL": "2",
        "TRAINYARD_LOG_LEVEL": "DEBUG",
        "TRAINYARD_LOG_FORMAT": "text",
    }
    assert set(env) == {v.env for v in VARIABLES}
    expected = Settings(
        kubeconfig=Path("/k"),
        namespaces=("a", "b"),
        coordinator_host="::1",
        coordinator_port=9443,
        coordinator_url="https://here:9443",
        coordinator_ca=Path("/ca"),
        coordinator_cert=Path("/cert"),
        coordinator_key=Path("/key"),
        web_host="127.0.0.1",
        web_port=0,
        lease_namespace="system",
        lease_name="mine",
        lease_duration=6.0,
        identity="me",
        workers=3,
        resync_seconds=60.0,
        agent_ttl=5.5,
        status_interval=2.0,
        log_level="debug",
        log_format="text",
    )
    assert load(env) == expected
    assert load(env, {"workers": "7", "namespaces": None}).workers == 7
    assert load({**env, "TRAINYARD_WORKERS": "", "UNRELATED": "x"}).workers == Settings().workers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("namespaces", "Team_A"),
        ("coordinator-bind", "8443"),
        ("coordinator-bind", "somewhere:8443"),
        ("web-bind", "0.0.0.0:70000"),
        ("coordinator-url", "http://plain:8443"),
        ("coordinator-url", "https://user:secret@host:8443"),
        ("lease-namespace", "a.b"),
        ("lease-name", "A b"),
        ("lease-duration", "1"),
        ("workers", "0"),
        ("workers", "many"),
        ("agent-ttl", "nan"),
        ("resync-seconds", "-5"),
        ("log-level", "loud"),
        ("log-format", "xml"),
    ],
)
def test_a_wrong_value_is_blamed_on_its_variable(name: str, value: str) -> None:
    variable = next(v for v in VARIABLES if v.name == name)
    with pytest.raises(ValueError, match=f"^{variable.env}: "):
        load({variable.env: value})
    with pytest.raises(ValueError, match=f"^--{name}: "):
        load({}, {name: value})


def test_the_plan_gets_the_ca_itself_and_never_a_key(tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_text("-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n")
    made = Settings(coordinator_ca=ca, coordinator_url="https://x:1", agent_ttl=4.0).plan_settings()
    assert (made.coordinator_ca, made.coordinator_url, made.agent_ttl) == (ca.read_text(), "https://x:1", 4.0)
    for content in ("nonsense", ca.read_text() + "-----BEGIN PRIVATE KEY-----"):
        ca.write_text(content)
        with pytest.raises(ValueError, match="TRAINYARD_COORDINATOR_CA"):
            Settings(coordinator_ca=ca).plan_settings()
    with pytest.raises(ValueError, match="TRAINYARD_COORDINATOR_CA"):
        Settings(coordinator_ca=tmp_path / "missing").plan_settings()


def test_the_lease_lives_in_the_pods_namespace(tmp_path: Path) -> None:
    assert pod_namespace(tmp_path) is None
    (tmp_path / "namespace").write_text("trainyard-system\n")
    assert pod_namespace(tmp_path) == "trainyard-system"
