"""Who we are to the API server: from the pod's service account, or from a kubeconfig.

Read with pyyaml rather than with `kubernetes.config`, whose import costs some 60 MiB of memory (measured).
Supported is what operators meet: certificate authority, client certificate, token, token file, and exec
plugins that give tokens.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import logging
import os
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REREAD_SECONDS = 60.0
"""A projected token is replaced at 80 % of its life (an hour at least): a minute late is in time."""
EXEC_SECONDS = 30.0
"""How long an exec plugin may take."""
EXEC_MARGIN = 60.0
"""Seconds before its end at which a plugin's token is renewed."""

log = logging.getLogger(__name__)


class CredentialsError(ValueError):
    """The kubeconfig, or the pod's service account, cannot be used. Says which field of which file."""


class TokenSource(Protocol):
    """Gives the bearer token to use now."""

    async def token(self, *, refused: bool = False) -> str:
        """`refused`: the server answered 401 to the one given before, so look again."""
        ...


class StaticToken:
    """A token that does not change; empty for none."""

    def __init__(self, value: str) -> None:
        self._value = value

    async def token(self, *, refused: bool = False) -> str:
        return self._value


class FileToken:
    """A token in a file that somebody else renews (a projected service-account token)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._value = self._read()
        self._read_at = time.monotonic()

    def _read(self) -> str:
        try:
            return self._path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CredentialsError(f"cannot read the token file {self._path}: {error}") from None

    async def token(self, *, refused: bool = False) -> str:
        if refused or time.monotonic() - self._read_at >= REREAD_SECONDS:
            try:
                self._value = self._read()
            except CredentialsError as error:  # the one we have may be good still; if not, 401 will say so
                log.warning("%s; going on with the token read before", error)
            self._read_at = time.monotonic()
        return self._value


class ExecToken:
    """A token that a program prints (client.authentication.k8s.io ExecCredential)."""

    def __init__(self, spec: Mapping[str, Any], directory: Path) -> None:
        command = str(spec.get("command", ""))
        # As client-go: a command with a slash is relative to the kubeconfig, others are looked up in PATH.
        self._command = str(directory / command) if os.sep in command else command
        self._arguments = [str(a) for a in spec.get("args") or ()]
        self._environment = {e["name"]: e["value"] for e in spec.get("env") or ()}
        self._api_version = str(spec.get("apiVersion", "client.authentication.k8s.io/v1"))
        self._value = ""
        self._until = 0.0
        self._lock = asyncio.Lock()

    async def token(self, *, refused: bool = False) -> str:
        async with self._lock:
            if refused or time.time() >= self._until:
                await self._renew()
            return self._value

    async def _renew(self) -> None:
        # In a thread: asyncio's own subprocesses can wait for ever for a killed child whose pipe is full.
        self._take(await asyncio.to_thread(self._run))

    def _run(self) -> bytes:
        request = {
            "apiVersion": self._api_version,
            "kind": "ExecCredential",
            "spec": {"interactive": False},
        }
        environment = os.environ | self._environment | {"KUBERNETES_EXEC_INFO": json.dumps(request)}
        try:
            done = subprocess.run(
                [self._command, *self._arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=EXEC_SECONDS,
                check=False,
            )
        except OSError as error:
            raise CredentialsError(f"cannot run the exec plugin {self._command}: {error}") from None
        except subprocess.TimeoutExpired:
            raise CredentialsError(
                f"the exec plugin {self._command} did not end within {EXEC_SECONDS:.1f} s"
            ) from None
        if done.returncode != 0:
            raise CredentialsError(f"the exec plugin {self._command} ended with {done.returncode}")
        return done.stdout

    def _take(self, output: bytes) -> None:
        try:
            status = json.loads(output)["status"]
            self._value = status["token"]
            expires = status.get("expirationTimestamp")
            until = datetime.datetime.fromisoformat(expires).timestamp() if expires else float("inf")
        except (ValueError, KeyError, TypeError) as error:
            # Not the output itself: it holds secrets.
            raise CredentialsError(
                f"the exec plugin {self._command} did not print an ExecCredential with a token: "
                f"{type(error).__name__}"
            ) from None
        self._until = until - EXEC_MARGIN


@dataclass(frozen=True, slots=True)
class Credentials:
    """All that is needed to talk to one API server."""

    server: str
    """URL without a slash at its end."""
    tls: ssl.SSLContext | None
    """None for http."""
    token: TokenSource | None = None


def load(kubeconfig: Path | None = None, context: str | None = None) -> Credentials:
    """In a pod the service account's, unless a kubeconfig is named; else as kubectl would find them.

    Raises CredentialsError.
    """
    if kubeconfig is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
        return in_cluster()
    return from_kubeconfig(kubeconfig or default_kubeconfig(), context)


def in_cluster(
    directory: Path = SERVICE_ACCOUNT, environment: Mapping[str, str] | None = None
) -> Credentials:
    """The pod's own service account. Raises CredentialsError outside of a pod."""
    environment = os.environ if environment is None else environment
    host = environment.get("KUBERNETES_SERVICE_HOST", "")
    port = environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise CredentialsError("not in a pod: KUBERNETES_SERVICE_HOST is not set")
    if ":" in host:
        host = f"[{host}]"
    try:
        tls = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    except OSError as error:
        raise CredentialsError(f"cannot read {directory / 'ca.crt'}: {error}") from None
    return Credentials(f"https://{host}:{port}", tls, FileToken(directory / "token"))


def default_kubeconfig() -> Path:
    """The first file of $KUBECONFIG that exists, or ~/.kube/config. Files are not merged."""
    named = [Path(p) for p in os.environ.get("KUBECONFIG", "").split(os.pathsep) if p]
    return next((p for p in named if p.exists()), Path.home() / ".kube" / "config")


def from_kubeconfig(path: Path, context: str | None = None) -> Credentials:
    """The cluster and user of `context`, or of the current context. Raises CredentialsError."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CredentialsError(f"cannot read the kubeconfig {path}: {error}") from None
    if not isinstance(config, dict):
        raise CredentialsError(f"{path} is not a kubeconfig")
    chosen = _named(config, "contexts", "context", context or config.get("current-context"), path)
    cluster = _named(config, "clusters", "cluster", chosen.get("cluster"), path)
    user = _named(config, "users", "user", chosen.get("user"), path) if chosen.get("user") else {}
    server = str(cluster.get("server", "")).rstrip("/")
    if not server.startswith(("https://", "http://")):
        raise CredentialsError(f"{path}: the cluster's server {server!r} is not a URL")
    tls = _tls(cluster, user, path) if server.startswith("https://") else None
    return Credentials(server, tls, _token(user, path))


def _named(config: Mapping[str, Any], section: str, field: str, name: Any, path: Path) -> dict[str, Any]:
    for entry in config.get(section) or ():
        if entry.get("name") == name:
            return dict(entry.get(field) or {})
    raise CredentialsError(f"{path}: {section} has no {name!r}")


def _token(user: Mapping[str, Any], path: Path) -> TokenSource | None:
    if user.get("tokenFile"):
        return FileToken(path.parent / user["tokenFile"])
    if user.get("token"):
        return StaticToken(str(user["token"]))
    if user.get("exec"):
        return ExecToken(user["exec"], path.parent)
    for unsupported in ("auth-provider", "username"):
        if user.get(unsupported):
            raise CredentialsError(f"{path}: users with {unsupported} are not supported; use a token or exec")
    return None


def _tls(cluster: Mapping[str, Any], user: Mapping[str, Any], path: Path) -> ssl.SSLContext:
    authority = _pem(cluster, "certificate-authority", path)
    try:
        context = ssl.create_default_context(cadata=authority.decode() if authority else None)
        if cluster.get("insecure-skip-tls-verify"):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        certificate, key = _pem(user, "client-certificate", path), _pem(user, "client-key", path)
        if certificate and key:
            # OpenSSL reads these from files only. The directory is readable to us alone, and gone at once.
            with tempfile.TemporaryDirectory(prefix="trainyard-") as directory:
                pair = Path(directory) / "pair.pem"
                pair.touch(mode=0o600)
                pair.write_bytes(certificate + b"\n" + key)
                context.load_cert_chain(pair)
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise CredentialsError(f"{path}: unusable certificate: {error}") from None
    return context


def _pem(section: Mapping[str, Any], field: str, path: Path) -> bytes | None:
    """`field` as a file (relative to the kubeconfig) or, with priority, as `field`-data in base64."""
    try:
        if section.get(f"{field}-data"):
            return base64.b64decode(str(section[f"{field}-data"]), validate=True)
        if section.get(field):
            return (path.parent / str(section[field])).read_bytes()
    except (OSError, ValueError) as error:
        raise CredentialsError(f"{path}: cannot read {field}: {error}") from None
    return None
