"""What the uploader says of a store before any worker has started."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from trainyard.checkpoint import uploader
from trainyard.checkpoint.errors import StoreConfigError, StoreUnavailable
from trainyard.checkpoint.store_local import LocalStore
from trainyard.checkpoint.uploads import UploadService
from trainyard_agent import hearsay
from trainyard_agent.state import State
from trainyard_api.protocol import Beat


class Refusing(LocalStore):
    """A folder that answers as a bucket that is not there would."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(path.as_uri(), "run")
        self.error = error

    def list(self, prefix: str) -> list[str]:
        raise self.error


def test_only_what_a_user_must_change_is_a_refusal(tmp_path: Path) -> None:
    assert uploader.refusal(Refusing(tmp_path, StoreConfigError("no such bucket"))) == "no such bucket"
    assert uploader.refusal(Refusing(tmp_path, StoreUnavailable("down for a moment"))) == ""
    assert uploader.refusal(LocalStore(tmp_path.as_uri(), "run")) == ""


def test_the_agent_hears_it_when_it_subscribes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path.as_uri(), "run")
    service = UploadService(store, "run", staging=tmp_path, keep=2)
    path = tmp_path / "socket"
    server = uploader._Server(str(path), service, "no such bucket")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(path))
            client.sendall(b'{"op":"subscribe"}\n')
            line = client.makefile().readline()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        service.flush(0)
    assert json.loads(line) == {"op": "refused", "message": "no such bucket"}


def test_it_reaches_the_beat() -> None:
    state = State(beat=Beat(pod_name="p", pod_uid="u", incarnation="i", node_index=0))
    after, line = hearsay.uploader_said(state, {"op": "refused", "message": "no such bucket"})
    assert after.beat.blocked == "no such bucket" and "no such bucket" in line
    with pytest.raises(KeyError):
        hearsay.uploader_said(state, {"op": "refused"})
