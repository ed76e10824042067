"""Tokens and certificates for tests of the coordinator: made here, known to nobody else."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

from trainyard_api.contract import TOKEN_AUDIENCE
from trainyard_operator.kube.api import Object

NOW = 1_000_000.0
"""The time of tests.fakes.clock.FakeClock."""


def jwt(pod_uid: str, *, exp: float = NOW + 3600, aud: object = (TOKEN_AUDIENCE,), **more: object) -> str:
    """Shaped as a service-account token; the fake API server takes the pod's UID out of it."""
    claims = {"aud": list(aud) if isinstance(aud, tuple) else aud, "exp": exp, "pod": pod_uid, **more}
    parts = [{"alg": "RS256"}, claims]
    head, body = (base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts)
    return f"{head}.{body}.c2lnbmF0dXJl"


def review(body: Object) -> Object:
    """What an API server answers to a TokenReview of such a token."""
    claims = json.loads(base64.urlsafe_b64decode(body["spec"]["token"].split(".")[1] + "=="))
    if claims.get("bad"):
        return {**body, "status": {"error": "[invalid bearer token, token lookup failed]"}}
    return {
        **body,
        "status": {
            "authenticated": True,
            "audiences": body["spec"]["audiences"],
            "user": {
                "username": "system:serviceaccount:team-a:default",
                "groups": ["system:serviceaccounts"],
                "extra": {
                    "authentication.kubernetes.io/pod-name": [f"name-{claims['pod']}"],
                    "authentication.kubernetes.io/pod-uid": [claims["pod"]],
                },
            },
        },
    }


def certificate(folder: Path, name: str = "tls") -> tuple[Path, Path]:
    """A self-signed certificate for localhost and 127.0.0.1: (certificate, key)."""
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )  # fmt: skip
    return cert, key
