"""What the agent asks of a zygote or of a fresh launcher, and how it crosses the socket between them."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from typing import Any

from trainyard_api.serde import decode, encode

MAX_LINE = 4 * 1024 * 1024
"""Bytes of one request; the environment is most of it."""
MAX_FDS = 253
"""SCM_MAX_FD of Linux: descriptors that one message can carry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """One attempt on this node.

    The descriptors that travel with it: the report pipe, then stdout and stderr of each local rank.
    """

    attempt: int
    run_id: str
    """Unique for (run, attempt): the prefix of the rendezvous store's keys."""
    node_rank: int
    nodes: int
    procs_per_node: int
    master_addr: str
    master_port: int
    local_addr: str
    work_dir: str
    """Empty folder of this attempt: error files."""
    agent_pid: int
    fork: bool
    """True: the workers are forked with torch imported; False: each is a fresh process."""
    env: dict[str, str] = field(default_factory=dict)
    """The whole environment of launcher and workers."""

    @property
    def first_rank(self) -> int:
        return self.node_rank * self.procs_per_node

    @property
    def world_size(self) -> int:
        return self.nodes * self.procs_per_node

    def to_line(self) -> bytes:
        return json.dumps({"op": "launch", **encode(self)}).encode() + b"\n"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LaunchRequest:
        """Raises ValueError that names the field."""
        return decode(cls, data)


def receive_request(channel: socket.socket) -> tuple[LaunchRequest, list[int]] | None:
    """The next request and its descriptors; None when the agent closed its end.

    Raises ValueError for what is not a request; OSError when the channel breaks.
    """
    text, fds = b"", []
    while not text.endswith(b"\n"):
        part, new, _flags, _address = socket.recv_fds(channel, 65536, MAX_FDS)
        fds += new
        text += part
        if not part:
            return None
        if len(text) > MAX_LINE:
            raise ValueError("a launch request is too long")
    return LaunchRequest.from_json(json.loads(text)), list(fds)


def send_request(channel: socket.socket, request: LaunchRequest, fds: list[int]) -> None:
    """Raises OSError when the other side is gone, TimeoutError when it does not read."""
    data = request.to_line()
    channel.settimeout(5.0)
    try:
        sent = socket.send_fds(channel, [data], fds)
        channel.sendall(data[sent:])
    finally:
        channel.setblocking(False)
