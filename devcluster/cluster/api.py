"""The few calls to the apiserver that this package makes itself; everything else is kubectl's business."""

from __future__ import annotations

import datetime
import http.client
import json
import ssl
from typing import Any
from urllib.parse import urlsplit

from devcluster.pki import Authority


class Api:
    """A client with the administrator's certificate."""

    def __init__(self, server: str, authority: Authority) -> None:
        self._address = urlsplit(server).netloc
        self._authority = authority

    def call(self, method: str, path: str, body: object = None, *, seconds: float = 5) -> tuple[int, Any]:
        """Status and decoded answer; status 0 when there is nobody to answer."""
        certificate, key = self._authority.issue("admin", "admin", ["system:masters"])
        context = ssl.create_default_context(cafile=str(self._authority.certificate))
        context.load_cert_chain(certificate, key)
        connection = http.client.HTTPSConnection(self._address, timeout=seconds, context=context)
        try:
            kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
            text = json.dumps(body) if body is not None else None
            connection.request(
                method, path, body=text, headers={"Content-Type": kind, "Accept": "application/json"}
            )
            response = connection.getresponse()
            answer = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)
        finally:
            connection.close()
        try:
            return response.status, json.loads(answer)
        except ValueError:
            return response.status, answer

    def ready(self) -> bool:
        """Whether the apiserver has finished starting."""
        return self.call("GET", "/readyz", seconds=2)[0] == 200

    def create(self, path: str, body: object) -> None:
        """Create an object unless it is there."""
        status, answer = self.call("POST", path, body, seconds=15)
        if status not in (200, 201, 409):
            raise RuntimeError(f"POST {path}: {status} {answer}")

    def nodes(self) -> dict[str, float | None]:
        """Every node's name, and when its kubelet last said that it is well; None if it is not Ready."""
        status, answer = self.call("GET", "/api/v1/nodes")
        if status != 200:
            return {}
        return {node["metadata"]["name"]: _ready_at(node) for node in answer["items"]}


def _ready_at(node: dict[str, Any]) -> float | None:
    for condition in node.get("status", {}).get("conditions") or []:
        if condition["type"] == "Ready" and condition["status"] == "True":
            return datetime.datetime.fromisoformat(condition["lastHeartbeatTime"]).timestamp()
    return None
