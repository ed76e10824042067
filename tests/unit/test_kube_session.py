"""Credentials and the shared session: tokens rotate, stay with their server, and kopf cannot close what is ours."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import kopf
import pytest
import yaml
import yarl
from kopf._cogs.structs.credentials import Vault

from tests.fakes.scripted_api import scripted
from trainyard_operator.kube import credentials
from trainyard_operator.kube.api import PODS, RUNS, ApiError
from trainyard_operator.kube.credentials import (
    Credentials,
    CredentialsError,
    ExecToken,
    FileToken,
    StaticToken,
)
from trainyard_operator.kube.session import connect, describe


def kubeconfig(
    path: Path, *, cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None
) -> Path:
    file = path / "config"
    body = {
        "current-context": "main",
        "contexts": [
            {"name": "main", "context": {"cluster": "c", "user": "u"}},
            {"name": "broken", "context": {"cluster": "nope", "user": "u"}},
        ],
        "clusters": [{"name": "c", "cluster": cluster or {"server": "http://127.0.0.1:1/"}}],
        "users": [{"name": "u", "user": user or {}}],
    }
    file.write_text(yaml.safe_dump(body))
    return file


async def token_of(found: Credentials) -> str:
    assert found.token is not None
    return await found.token.token()


async def test_kubeconfig_tokens(tmp_path: Path) -> None:
    (tmp_path / "tok").write_text("from-file\n")
    assert await token_of(credentials.from_kubeconfig(kubeconfig(tmp_path, user={"token": "t"}))) == "t"
    by_file = credentials.from_kubeconfig(kubeconfig(tmp_path, user={"tokenFile": "tok", "token": "t"}))
    assert await token_of(by_file) == "from-file"
    plain = credentials.from_kubeconfig(kubeconfig(tmp_path))
    assert plain == Credentials("http://127.0.0.1:1", None, None)


@pytest.mark.parametrize(
    ("cluster", "user", "message"),
    [
        ({"server": "127.0.0.1"}, {}, "not a URL"),
        ({"server": "https://x", "certificate-authority-data": "%"}, {}, "certificate-authority"),
        ({"server": "https://x", "certificate-authority": "missing.crt"}, {}, "certificate-authority"),
        (
            {"server": "https://x", "certificate-authority-data": base64.b64encode(b"no").decode()},
            {},
            "certificate",
        ),
        ({"server": "http://x"}, {"tokenFile": "missing"}, "token file"),
        ({"server": "http://x"}, {"username": "me"}, "username"),
    ],
)
def test_an_unusable_kubeconfig_says_why(
    tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any], message: str
) -> None:
    with pytest.raises(CredentialsError, match=message):
        credentials.from_kubeconfig(kubeconfig(tmp_path, cluster=cluster, user=user))


def test_missing_files_and_names_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CredentialsError, match="cannot read the kubeconfig"):
        credentials.from_kubeconfig(tmp_path / "none")
    (tmp_path / "list").write_text("[]")
    with pytest.raises(CredentialsError, match="not a kubeconfig"):
        credentials.from_kubeconfig(tmp_path / "list")
    file = kubeconfig(tmp_path)
    for context, message in {"other": "contexts has no 'other'", "broken": "clusters has no 'nope'"}.items():
        with pytest.raises(CredentialsError, match=message):
            credentials.from_kubeconfig(file, context)
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'none'}:{file}")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert credentials.load().server == "http://127.0.0.1:1"


def test_in_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = "".join(
        ssl.DER_cert_to_PEM_cert(der)
        for der in ssl.create_default_context().get_ca_certs(binary_form=True)[:1]
    )
    if not pem:
        pem = Path(str(ssl.get_default_verify_paths().cafile)).read_text()
    (tmp_path / "ca.crt").write_text(pem)
    (tmp_path / "token").write_text("t")
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    found = credentials.in_cluster(tmp_path, environment)
    assert found.server == "https://[fd00::1]:6443" and found.tls is not None
    assert found.tls.verify_mode == ssl.CERT_REQUIRED
    with pytest.raises(CredentialsError, match="not in a pod"):
        credentials.in_cluster(tmp_path, {})
    with pytest.raises(CredentialsError, match=r"ca\.crt"):
        credentials.in_cluster(tmp_path / "nowhere", environment)


def plugin(tmp_path: Path, program: str, **more: Any) -> ExecToken:
    return ExecToken({"command": sys.executable, "args": ["-I", "-S", "-c", program], **more}, tmp_path)


async def test_exec_plugins_give_tokens_until_they_expire(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    program = f"""
import json, os
info = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
with open({str(calls)!r}, "a+") as calls:
    calls.write("x")
    calls.seek(0)
    status = {{"token": os.environ["P"] + calls.read(), "expirationTimestamp": os.environ["UNTIL"]}}
print(json.dumps({{"kind": info["kind"], "status": status}}))
"""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
    variables = [{"name": "P", "value": "p-"}, {"name": "UNTIL", "value": stamp}]
    source = plugin(tmp_path, program, env=variables)
    assert list(await asyncio.gather(source.token(), source.token())) == ["p-x", "p-x"]
    assert await source.token(refused=True) == "p-xx"
    variables[1]["value"] = "2020-01-01T00:00:00Z"
    expired = plugin(tmp_path, program, env=variables)
    assert await expired.token() != await expired.token()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('secret')", "did not print"),
        ("raise SystemExit(3)", "ended with 3"),
        ("print('{}')", "did not print"),
    ],
)
async def test_a_failing_plugin_says_so_without_its_output(
    tmp_path: Path, program: str, message: str
) -> None:
    with pytest.raises(CredentialsError, match=message) as info:
        await plugin(tmp_path, program).token()
    assert "secret" not in str(info.value)
    with pytest.raises(CredentialsError, match="cannot run"):
        await ExecToken({"command": "./missing"}, tmp_path).token()


async def test_a_slow_plugin_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "EXEC_SECONDS", 0.2)
    with pytest.raises(CredentialsError, match="did not end within"):
        await plugin(tmp_path, "import time; time.sleep(60)").token()


# ---- the session ------------------------------------------------------------------------------------


async def test_a_refused_token_is_read_again_and_the_request_repeated(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    source = FileToken(file)
    async with scripted(credentials=lambda url: Credentials(url, None, source)) as (script, api):
        file.write_text("new")
        refused = script.json({"reason": "Unauthorized"}, 401)
        script.then(refused, script.json({"ok": 1}), refused)
        assert await api.create(PODS, "ns", {"a": 1}) == {"ok": 1}
        assert [r.headers["Authorization"] for r in script.requests] == ["Bearer old", "Bearer new"]
        assert script.bodies == [{"a": 1}, {"a": 1}]
        with pytest.raises(ApiError, match="401"):  # the same token again: no second try
            await api.create(PODS, "ns", {})
        assert len(script.requests) == 3


async def test_a_token_file_is_read_again_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    source = FileToken(file)
    file.write_text("new")
    assert await source.token() == "old"
    monkeypatch.setattr(credentials, "REREAD_SECONDS", 0.0)
    assert await source.token() == "new"
    file.unlink()
    assert await source.token() == "new", "better an old token than none"


async def test_the_token_goes_to_our_server_only() -> None:
    async with (
        scripted() as (other, _),
        scripted(credentials=lambda url: Credentials(url, None, StaticToken("t"))) as (script, _),
    ):
        assert other.connection is not None and script.connection is not None
        other.then(other.json({}))
        await (await script.connection.session.get(other.connection.server + "/x")).read()
        assert "Authorization" not in other.requests[0].headers


async def test_credentials_that_fail_are_status_0() -> None:
    class Broken:
        async def token(self, *, refused: bool = False) -> str:
            raise CredentialsError("no plugin")

    async with scripted(credentials=lambda url: Credentials(url, None, Broken())) as (_, api):
        with pytest.raises(ApiError, match="no plugin") as info:
            await api.create(PODS, "ns", {})
        assert (info.value.status, info.value.reason) == (0, "NoCredentials")


async def test_kopf_may_close_what_it_was_lent() -> None:
    seen: list[tuple[str, str, str]] = []
    async with scripted(
        observer=lambda verb, resource, code, seconds: seen.append((verb, resource, code)),
        credentials=lambda url: Credentials(url, None, StaticToken("t")),
    ) as (script, api):
        assert script.connection is not None
        from kopf._cogs.clients.auth import APIContext

        lent = script.connection.lend()
        info = kopf.AiohttpSession(server=script.connection.server, aiohttp_session=lent)
        vault = Vault({"ours": info})
        script.then(script.json({"by": "kopf"}), script.json({"by": "us"}))
        async for _, _, context in vault.extended(APIContext, "contexts"):
            async with context.session.get(f"{context.server}/api/v1/pods") as response:
                assert await response.json() == {"by": "kopf"}
        await vault.close()
        assert lent.closed
        assert await api.get(PODS, "ns", "p") == {"by": "us"}
        assert [r.headers["Authorization"] for r in script.requests] == ["Bearer t"] * 2
        again = kopf.AiohttpSession(server=script.connection.server, aiohttp_session=script.connection.lend())
        assert again != info, "or kopf would take it for the credentials that failed"
        await again.aiohttp_session.close()
    assert seen == [("LIST", "pods", "200"), ("GET", "pods", "200")]


async def test_observers_hear_of_failures() -> None:
    seen: list[tuple[str, str, str]] = []
    connection = connect(
        Credentials("http://127.0.0.1:1", None), observer=lambda v, r, c, s: seen.append((v, r, c))
    )
    with pytest.raises(OSError):
        await connection.session.post("http://127.0.0.1:1" + RUNS.path("ns"))
    await connection.close()
    assert seen == [("POST", "trainingruns", "error")]


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/api/v1/pods", ("LIST", "pods")),
        ("GET", "/api/v1/namespaces/n/pods?watch=true", ("WATCH", "pods")),
        ("GET", "/api/v1/namespaces/n/pods/p/log", ("GET", "pods/log")),
        ("GET", "/api/v1/namespaces/n", ("GET", "namespaces")),
        ("GET", "/api/v1/namespaces", ("LIST", "namespaces")),
        (
            "PATCH",
            "/apis/trainyard.dev/v1alpha1/namespaces/n/trainingruns/r/status",
            ("PATCH", "trainingruns/status"),
        ),
        ("POST", "/apis/authentication.k8s.io/v1/tokenreviews", ("POST", "tokenreviews")),
        ("GET", "/version", ("GET", "other")),
        ("GET", "/api/v1", ("GET", "other")),
        ("GET", "/", ("GET", "other")),
    ],
)
def test_requests_are_described_without_names(method: str, path: str, expected: tuple[str, str]) -> None:
    assert describe(method, yarl.URL("https://x:1" + path)) == expected


def test_the_plugin_request_is_what_the_api_defines(tmp_path: Path) -> None:
    """(client.authentication.k8s.io/v1 ExecCredential: kind, apiVersion, spec.interactive)"""
    program = "import os; open('info', 'w').write(os.environ['KUBERNETES_EXEC_INFO'])"
    source = plugin(tmp_path, f"import os; os.chdir({str(tmp_path)!r}); {program}")
    with pytest.raises(CredentialsError):
        asyncio.run(source.token())
    assert json.loads((tmp_path / "info").read_text()) == {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "spec": {"interactive": False},
    }
