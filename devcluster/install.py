"""Install the operator into a cluster, from `crds/` and `operator/deploy/`, as a platform team would by hand."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from devcluster.errors import DevclusterError
from devcluster.kube import Kubectl
from devcluster.progress import step

CHECKOUT = Path(__file__).resolve().parent.parent
NAMESPACE = "trainyard-system"
DEPLOYMENT = "trainyard-operator"
TLS_SECRET = "trainyard-coordinator-tls"  # noqa: S105 - a name
SERVICE = "trainyard-coordinator"
CERTIFICATE_DAYS = 365


def install(
    kubectl: Kubectl, *, operator_image: str, settings: Mapping[str, str] | None = None, seconds: float = 180
) -> None:
    """CRD, namespace, RBAC, TLS secret, Deployment; returns when the operator is ready.

    `settings` are environment variables of the operator (`python -m trainyard_operator run --help`).

    Idempotent: applying the same again changes nothing. Raises DevclusterError that shows the pod's own
    words when the operator does not become ready within `seconds`.
    """
    deploy = CHECKOUT / "operator" / "deploy"
    with step("installing the operator: CRD, RBAC, Deployment"):
        kubectl.apply(
            CHECKOUT / "crds" / "trainyard.dev_trainingruns.yaml", "--server-side", "--force-conflicts"
        )
        kubectl.wait("the CRD to be established", lambda: _established(kubectl), seconds=60)
        for name in ("namespace", "rbac", "service"):
            kubectl.apply(deploy / f"{name}.yaml")
        _ensure_tls(kubectl)
        kubectl.apply(_configured((deploy / "deployment.yaml").read_text(), operator_image, settings or {}))
    with step("waiting for the operator to be ready (it becomes leader and fills its caches first)"):
        try:
            kubectl(
                "-n", NAMESPACE, "rollout", "status", f"deployment/{DEPLOYMENT}",
                f"--timeout={seconds:.0f}s", seconds=seconds + 10,
            )  # fmt: skip
        except DevclusterError as error:
            raise DevclusterError(f"the operator did not become ready: {error}\n{explain(kubectl)}") from None


def _established(kubectl: Kubectl) -> bool:
    # Not `kubectl wait`: it fails on an object that has no conditions yet.
    crd = kubectl.json("crd", "trainingruns.trainyard.dev")
    conditions = crd.get("status", {}).get("conditions") or []
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


def uninstall(kubectl: Kubectl) -> None:
    """Remove the operator, the CRD and with it every TrainingRun."""
    with step("removing the operator and the CRD"):
        kubectl(
            "delete", "crd", "trainingruns.trainyard.dev", "--ignore-not-found", "--timeout=60s", seconds=70
        )
        kubectl(
            "delete",
            "-f",
            str(CHECKOUT / "operator" / "deploy" / "rbac.yaml"),
            "--ignore-not-found",
            seconds=70,
        )
        kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=120s", seconds=130)


def explain(kubectl: Kubectl) -> str:
    """What a person would look at when the operator is not ready."""
    parts = []
    for args in (
        ("get", "pods", "-o", "wide"),
        ("get", "events", "--sort-by=.lastTimestamp"),
        ("logs", f"deployment/{DEPLOYMENT}", "--tail=30"),
    ):
        try:
            parts.append(kubectl("-n", NAMESPACE, *args, seconds=15)[-3000:])
        except DevclusterError as error:
            parts.append(str(error))
    return "\n".join(parts)


def _configured(manifest: str, image: str, settings: Mapping[str, str]) -> str:
    documents = [d for d in yaml.safe_load_all(manifest) if d]
    for document in documents:
        if document["kind"] == "Deployment":
            for container in document["spec"]["template"]["spec"]["containers"]:
                container["image"] = image
                container["env"] += [{"name": k, "value": v} for k, v in sorted(settings.items())]
    return yaml.safe_dump_all(documents)


def _ensure_tls(kubectl: Kubectl) -> None:
    """A CA of this installation's own, and the coordinator's certificate. Kept while it is valid: running pods
    trust this CA."""
    if kubectl.find("-n", NAMESPACE, "secret", TLS_SECRET):
        return
    names = [SERVICE, f"{SERVICE}.{NAMESPACE}", f"{SERVICE}.{NAMESPACE}.svc"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        alt = ",".join(f"DNS:{n}" for n in names)
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        _openssl(
            path, "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.crt", "-days", str(CERTIFICATE_DAYS),
            "-subj", "/CN=trainyard-coordinator-ca", "-addext", "basicConstraints=critical,CA:TRUE",
            "-addext", "keyUsage=critical,keyCertSign",
        )  # fmt: skip
        _openssl(path, "req", *new_key, "-keyout", "tls.key", "-out", "tls.csr", "-subj", f"/CN={names[-1]}")
        (path / "ext").write_text(
            f"subjectAltName={alt}\nbasicConstraints=critical,CA:FALSE\n"
            "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\n"
        )
        _openssl(
            path, "x509", "-req", "-in", "tls.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", "tls.crt", "-days", str(CERTIFICATE_DAYS), "-extfile", "ext",
        )  # fmt: skip
        # From files and by stdin: a key in an argument would be readable in /proc.
        secret = kubectl(
            "-n", NAMESPACE, "create", "secret", "generic", TLS_SECRET, "--dry-run=client", "-o", "yaml",
            *(f"--from-file={path / f}" for f in ("tls.crt", "tls.key", "ca.crt")),
        )  # fmt: skip
        kubectl.apply(secret)


def _openssl(folder: Path, *args: str) -> None:
    done = subprocess.run(
        ["openssl", *args], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        raise DevclusterError(f"openssl {args[0]}: {done.stderr.strip()[-500:]}")
