"""The little that must be remembered of a cluster: how many nodes it is to have, its ports, its S3 keys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from devcluster.cluster.controlplane import Ports
from devcluster.pki import write


@dataclasses.dataclass(slots=True)
class State:
    """Written before it is acted upon, so that an interrupted `up` is never forgotten by `down`."""

    nodes: int = 0
    ports: Ports | None = None
    s3_secret: str | None = None


def load(folder: Path) -> State:
    """What was saved, or the state of a cluster of which there is nothing yet."""
    path = folder / "cluster.json"
    if not path.exists():
        return State()
    saved = json.loads(path.read_text())
    ports = Ports(**saved["ports"]) if saved["ports"] else None
    return State(saved["nodes"], ports, saved["s3_secret"])


def save(folder: Path, state: State) -> None:
    """Remember it."""
    write(folder / "cluster.json", json.dumps(dataclasses.asdict(state), indent=1), mode=0o600)
