"""Reading the API server's audit log."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

OPERATOR = "system:serviceaccount:trainyard-system:trainyard-operator"
WRITES = {"create", "update", "patch", "delete", "deletecollection"}


def writes(audit_log: Path, *, since: float, user: str = OPERATOR) -> list[str]:
    """What the operator wrote since then, renewals of its own Lease aside (a heartbeat is not a decision)."""
    found = []
    for line in audit_log.read_text().splitlines():
        event = json.loads(line)
        if (
            event["user"].get("username") != user
            or event["verb"] not in WRITES
            or event["stage"] != "ResponseComplete"
        ):
            continue
        ref = event.get("objectRef", {})
        if ref.get("resource") == "leases":
            continue
        at = datetime.datetime.fromisoformat(event["requestReceivedTimestamp"]).timestamp()
        if at >= since:
            found.append(
                f"{event['verb']} {ref.get('resource')}/{ref.get('name', '')} {ref.get('subresource', '')}"
            )
    return found
