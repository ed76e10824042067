"""Plain requests to the real API server, with its answers as they are: what users would be told."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from trainyard_operator.kube import credentials

RUNS = "/apis/trainyard.dev/v1alpha1/namespaces/{namespace}/trainingruns"
REQUEST_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Answer:
    """Status code, decoded body, and the warnings that kubectl would print."""

    code: int
    body: Any
    warnings: tuple[str, ...]

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))

    @property
    def causes(self) -> list[tuple[str, str]]:
        """(field, message) of everything that is wrong with the object."""
        details = self.body.get("details") or {}
        return [(c.get("field", ""), c.get("message", "")) for c in details.get("causes") or []]


class Server:
    """One kept connection with the administrator's certificate."""

    def __init__(self, kubeconfig: Path) -> None:
        found = credentials.load(kubeconfig)
        url = urlsplit(found.server)
        context = found.tls
        assert isinstance(context, ssl.SSLContext) and url.hostname
        self._connection = http.client.HTTPSConnection(
            url.hostname, url.port, timeout=REQUEST_SECONDS, context=context
        )

    def close(self) -> None:
        self._connection.close()

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        user: str | None = None,
        content_type: str = "application/json",
    ) -> Answer:
        """`user` is impersonated. PATCH is a merge patch unless `content_type` says otherwise."""
        if method == "PATCH" and content_type == "application/json":
            content_type = "application/merge-patch+json"
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        if user:
            headers["Impersonate-User"] = user
        url = f"{path}?{urlencode(query)}" if query else path
        self._connection.request(
            method, url, body=None if body is None else json.dumps(body), headers=headers
        )
        response = self._connection.getresponse()
        text = response.read()
        warnings = tuple(response.headers.get_all("Warning") or ())
        # A path that the server does not know is answered in plain text.
        is_json = (response.headers.get("Content-Type") or "").startswith("application/json")
        decoded = json.loads(text) if is_json else {"message": text.decode()}
        return Answer(response.status, decoded, warnings)

    def create(self, path: str, body: Any, **options: Any) -> Any:
        """The created object; AssertionError with the server's words when it is refused."""
        answer = self.request("POST", path, body, **options)
        assert answer.code == 201, answer.body
        return answer.body


@contextmanager
def connected(kubeconfig: Path) -> Iterator[Server]:
    server = Server(kubeconfig)
    try:
        yield server
    finally:
        server.close()
