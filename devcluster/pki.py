"""Keys, certificates and kubeconfigs, made with the openssl program because Python has no such thing built in."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

from devcluster.proc import run

_DAYS = 3650
_AUTHORITY = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"]


class Authority:
    """A certificate authority in a folder, and what it has signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate = folder / "ca.crt"
        self.key = folder / "ca.key"

    def ensure(self) -> None:
        """Make the authority and the key that signs service-account tokens, unless they are there."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.certificate.exists():
            self._request(self.certificate, self.key, "/CN=trainyard-devcluster", _AUTHORITY)
        if not self.token_key.exists():
            partial = self.token_key.with_suffix(".partial")
            run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", partial)
            partial.rename(self.token_key)

    @property
    def token_key(self) -> Path:
        """Signs and verifies service-account tokens: the private key holds the public one."""
        return self.folder / "tokens.key"

    def issue(
        self, name: str, user: str, groups: Iterable[str] = (), addresses: Iterable[str] = ()
    ) -> tuple[Path, Path]:
        """A certificate and key for a client, and for a server if it has addresses; made once."""
        certificate, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        names = [f"{'IP' if _is_ip(address) else 'DNS'}:{address}" for address in addresses]
        note = self.folder / f"{name}.names"
        wanted = json.dumps([user, list(groups), names])
        if not certificate.exists() or not note.exists() or note.read_text() != wanted:
            subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
            usage = "clientAuth,serverAuth" if names else "clientAuth"
            extensions = ["basicConstraints=critical,CA:FALSE", f"extendedKeyUsage={usage}"]
            if names:
                extensions.append(f"subjectAltName={','.join(names)}")
            self._request(certificate, key, subject, extensions, signed=True)
            note.write_text(wanted)
        return certificate, key

    def _request(
        self, certificate: Path, key: Path, subject: str, extensions: list[str], *, signed: bool = False
    ) -> None:
        partial = certificate.with_suffix(".crt.partial")
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
        ]
        command += [
            "-sha256",
            "-days",
            str(_DAYS),
            "-subj",
            subject,
            "-keyout",
            str(key),
            "-out",
            str(partial),
        ]
        if signed:
            command += ["-CA", str(self.certificate), "-CAkey", str(self.key)]
        # An empty configuration, so that Debian's defaults add nothing (twice the same extension is an error).
        command += ["-config", "/dev/stdin"]
        for extension in extensions:
            command += ["-addext", extension]
        run(*command, text="[req]\ndistinguished_name=dn\n[dn]\n")
        partial.rename(certificate)

    def kubeconfig(self, path: Path, server: str, name: str, user: str, groups: Iterable[str] = ()) -> Path:
        """A kubeconfig with everything inside it; JSON is YAML too."""
        certificate, key = self.issue(name, user, groups)
        write(
            path,
            json.dumps(_kubeconfig(server, user, self.certificate, certificate, key), indent=1),
            mode=0o600,
        )
        return path


def _kubeconfig(server: str, user: str, authority: Path, certificate: Path, key: Path) -> dict[str, object]:
    def inline(file: Path) -> str:
        return base64.b64encode(file.read_bytes()).decode()

    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "trainyard",
                "cluster": {"server": server, "certificate-authority-data": inline(authority)},
            }
        ],
        "users": [
            {
                "name": user,
                "user": {"client-certificate-data": inline(certificate), "client-key-data": inline(key)},
            }
        ],
        "contexts": [{"name": "trainyard", "context": {"cluster": "trainyard", "user": user}}],
        "current-context": "trainyard",
    }


def _is_ip(address: str) -> bool:
    return address.replace(".", "").isdigit()


def write(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.touch(mode=mode)
    partial.write_text(text)
    partial.replace(path)
