"""The operator's settings: environment variables, overridden by flags, as one frozen value.

`VARIABLES` is the list of record: cli.py makes the flags of it and `--help` prints it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from trainyard_operator.plan.model import PlanSettings

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
DNS_NAME = re.compile(rf"{DNS_LABEL.pattern}(\.{DNS_LABEL.pattern})*")
COORDINATOR_PORT = 8443
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("json", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an administrator decides when starting the operator. Times are seconds."""

    kubeconfig: Path | None = None
    """None: the pod's service account."""
    namespaces: tuple[str, ...] = ()
    """Where TrainingRuns are acted upon; empty is everywhere."""
    coordinator_host: str = "0.0.0.0"  # noqa: S104 - agents come from other nodes
    coordinator_port: int = COORDINATOR_PORT
    coordinator_url: str = ""
    """What agents are told to call: the https URL of the Service."""
    coordinator_ca: Path = Path("/etc/trainyard/tls/ca.crt")
    coordinator_cert: Path = Path("/etc/trainyard/tls/tls.crt")
    coordinator_key: Path = Path("/etc/trainyard/tls/tls.key")
    web_host: str = "0.0.0.0"  # noqa: S104 - kubelet and Prometheus come from outside the pod
    web_port: int = 8080
    lease_namespace: str = "default"
    lease_name: str = "trainyard-operator"
    lease_duration: float = 15.0
    identity: str = ""
    workers: int = 8
    resync_seconds: float = 300.0
    agent_ttl: float = 10.0
    status_interval: float = 10.0
    log_level: str = "info"
    log_format: str = "json"

    def plan_settings(self) -> PlanSettings:
        """The part that decisions depend on; reads the CA file. Raises ValueError when it cannot."""
        try:
            ca = self.coordinator_ca.read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise ValueError(f"TRAINYARD_COORDINATOR_CA: {self.coordinator_ca}: {error}") from None
        if "-----BEGIN CERTIFICATE-----" not in ca or "PRIVATE KEY" in ca:
            raise ValueError(f"TRAINYARD_COORDINATOR_CA: {self.coordinator_ca} is not a PEM certificate")
        return PlanSettings(
            coordinator_url=self.coordinator_url,
            coordinator_ca=ca,
            agent_ttl=self.agent_ttl,
            status_interval=self.status_interval,
        )


# ---- readers of one value each; they raise ValueError without the variable's name ---------------------


def _namespaces(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    for name in names:
        if not DNS_LABEL.fullmatch(name):
            raise ValueError(f"{name!r} is not a namespace")
    return names


def _bind(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not ADDRESS:PORT")
    if host:
        ipaddress.ip_address(host)  # a name could resolve to something else than was meant
    return host or "0.0.0.0", int(port)  # noqa: S104


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{text!r} is not an https://HOST:PORT URL")
    return text.rstrip("/")


def _name(text: str) -> str:
    if not DNS_NAME.fullmatch(text) or len(text) > 253:
        raise ValueError(f"{text!r} is not a Kubernetes name")
    return text


def _label(text: str) -> str:
    if not DNS_LABEL.fullmatch(text):
        raise ValueError(f"{text!r} is not a namespace")
    return text


def _between(low: float, high: float, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise ValueError(f"{text} is not between {low:g} and {high:g}")
        return value

    return read


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text.lower()

    return read


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting: environment variable TRAINYARD_<NAME>, flag --<name>."""

    name: str
    fields: tuple[str, ...]
    """The fields of Settings that the value sets; with more than one, `read` returns a tuple."""
    read: Callable[[str], Any]
    text: str
    """Help; the default is part of it."""

    @property
    def env(self) -> str:
        return "TRAINYARD_" + self.name.upper().replace("-", "_")


VARIABLES: Final = (
    Variable("kubeconfig", ("kubeconfig",), Path, "kubeconfig file; without it the pod's service account"),
    Variable("namespaces", ("namespaces",), _namespaces, "comma-separated namespaces to act in [all]"),
    Variable(
        "coordinator-bind",
        ("coordinator_host", "coordinator_port"),
        _bind,
        "address:port that agents call over HTTPS [0.0.0.0:8443]",
    ),
    Variable(
        "coordinator-url",
        ("coordinator_url",),
        _url,
        "https URL at which agents reach it [the Service trainyard-coordinator in the lease's namespace]",
    ),
    Variable(
        "coordinator-ca", ("coordinator_ca",), Path, "PEM of the CA for agents [/etc/trainyard/tls/ca.crt]"
    ),
    Variable("coordinator-cert", ("coordinator_cert",), Path, "PEM certificate [/etc/trainyard/tls/tls.crt]"),
    Variable("coordinator-key", ("coordinator_key",), Path, "PEM private key [/etc/trainyard/tls/tls.key]"),
    Variable(
        "web-bind", ("web_host", "web_port"), _bind, "address:port of probes and metrics [0.0.0.0:8080]"
    ),
    Variable(
        "lease-namespace", ("lease_namespace",), _label, "namespace of the lease [the pod's, or default]"
    ),
    Variable("lease-name", ("lease_name",), _name, "name of the leader's lease [trainyard-operator]"),
    Variable(
        "lease-duration",
        ("lease_duration",),
        _between(3, 300, float),
        "seconds after which another process may take over from a leader that is silent [15]",
    ),
    Variable("identity", ("identity",), _name, "this process in the lease [host name and a random part]"),
    Variable("workers", ("workers",), _between(1, 256, int), "runs that are reconciled at the same time [8]"),
    Variable(
        "resync-seconds",
        ("resync_seconds",),
        _between(10, 86400, float),
        "every run is looked at so often [300]",
    ),
    Variable(
        "agent-ttl", ("agent_ttl",), _between(3, 600, float), "an agent silent for so long is lost [10]"
    ),
    Variable(
        "status-interval",
        ("status_interval",),
        _between(1, 3600, float),
        "least seconds between two writes of mere progress [10]",
    ),
    Variable("log-level", ("log_level",), _one_of(*LOG_LEVELS), "debug, info, warning or error [info]"),
    Variable("log-format", ("log_format",), _one_of(*LOG_FORMATS), "json or text [json]"),
)


def pod_namespace(root: Path = SERVICE_ACCOUNT) -> str | None:
    """The namespace of the pod that this process runs in; None outside a cluster."""
    try:
        return (root / "namespace").read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def load(
    env: Mapping[str, str], flags: Mapping[str, str | None] | None = None, *, host: str | None = None
) -> Settings:
    """Settings from `env`, overridden by `flags` (by Variable.name; None is not given).

    Raises ValueError that names the variable. An empty environment variable counts as not set.
    """
    values: dict[str, Any] = {}
    for variable in VARIABLES:
        text = (flags or {}).get(variable.name)
        source = f"--{variable.name}"
        if text is None:
            text, source = env.get(variable.env) or None, variable.env
        if text is None:
            continue
        try:
            value = variable.read(text)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        values |= dict(zip(variable.fields, value if len(variable.fields) > 1 else (value,), strict=True))
    values.setdefault("lease_namespace", pod_namespace() or "default")
    values.setdefault("identity", f"{(host or os.uname().nodename).lower()}-{uuid.uuid4().hex[:8]}")
    port = values.get("coordinator_port", COORDINATOR_PORT)
    service = f"trainyard-coordinator.{values['lease_namespace']}.svc"
    values.setdefault("coordinator_url", f"https://{service}:{port}")
    return Settings(**values)
