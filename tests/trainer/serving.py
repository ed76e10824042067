"""Servers of the serving example as processes of their own, and requests to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from devcluster.progress import wait_for

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "serving"
SECONDS = 120
"""For a server to come up on a machine that does much else."""


class Answer(NamedTuple):
    status: int
    body: Any


def request(url: str, body: Any = None, *, method: str | None = None, raw: bytes | None = None) -> Answer:
    """JSON there and back; an error status is an answer too. Raises httpx.TransportError if nobody listens."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    reply = httpx.request(
        method or ("GET" if data is None else "POST"), url, content=data, timeout=SECONDS, trust_env=False,
        headers={} if data is None else {"content-type": "application/json"},
    )  # fmt: skip
    return Answer(reply.status_code, reply.json())


def environment(**more: object) -> dict[str, str]:
    """Of somebody who has installed trainyard."""
    paths = [str(ROOT / "trainer-image"), str(ROOT / "operator")]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return os.environ | ours | {name: str(value) for name, value in more.items()}


@contextlib.contextmanager
def server(
    command: list[object], health: str, log: Path, *, env: Mapping[str, str], cwd: Path
) -> Iterator[None]:
    """Run `command` until the end of the block; it has a session of its own, all of which is ended."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(each) for each in command], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env=env, cwd=cwd, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(
            f"{health} answers", lambda: _answers(health), seconds=SECONDS, log=log,
            alive=lambda: process.poll() is None,
        )  # fmt: skip
        yield
    finally:
        _end(process)


def _answers(url: str) -> bool:
    try:
        return request(url).status == 200
    except httpx.TransportError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        process.poll()
        with contextlib.suppress(Exception):
            wait_for("the server has ended", lambda: not _group(process.pid), seconds=20)
            break
    process.wait(timeout=20)


def _group(pid: int) -> bool:
    """Whether any process of the group is still there; those that have ended are reaped or nobody's."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, fields = status.read_text().rpartition(")")
            state, _, group, *_ = fields.split()
            if int(group) == pid and state != "Z":
                return True
    return False
