"""Certificates: valid to those who check them, made once."""

from __future__ import annotations

import json
import ssl
from pathlib import Path

from devcluster.pki import Authority
from devcluster.proc import run


def test_certificates_verify_and_say_who_and_where(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.ensure()
    certificate, _ = authority.issue("s", "system:node:n", ["system:nodes"], ["node-1", "198.18.0.11"])
    run("openssl", "verify", "-CAfile", authority.certificate, certificate)
    text = run("openssl", "x509", "-in", certificate, "-noout", "-text").stdout
    assert "O = system:nodes, CN = system:node:n" in text
    assert "DNS:node-1, IP Address:198.18.0.11" in text
    assert "TLS Web Server Authentication" in text
    assert "CA:TRUE" not in text


def test_a_client_is_no_server(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.ensure()
    certificate, key = authority.issue("c", "admin", ["system:masters"])
    assert "Server Authentication" not in run("openssl", "x509", "-in", certificate, "-noout", "-text").stdout
    ssl.create_default_context().load_cert_chain(certificate, key)


def test_nothing_is_made_twice_unless_it_must_say_something_else(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.ensure()
    before = (authority.certificate.read_bytes(), authority.issue("s", "u", addresses=["a"])[0].read_bytes())
    authority.ensure()
    assert before == (
        authority.certificate.read_bytes(),
        authority.issue("s", "u", addresses=["a"])[0].read_bytes(),
    )
    assert authority.issue("s", "u", addresses=["b"])[0].read_bytes() != before[1]


def test_kubeconfigs_are_private(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.ensure()
    path = authority.kubeconfig(tmp_path / "k", "https://h:1", "admin", "admin")
    assert path.stat().st_mode & 0o077 == 0
    assert json.loads(path.read_text())["clusters"][0]["cluster"]["server"] == "https://h:1"
