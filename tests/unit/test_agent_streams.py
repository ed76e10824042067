"""The worker's line to the agent, the log of the workers, launch requests, and the agent's settings."""

from __future__ import annotations

import json
import os
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainyard.elastic.client import AgentClient
from trainyard_agent.inbox import Inbox, listen
from trainyard_agent.launchrequest import LaunchRequest, receive_request, send_request
from trainyard_agent.lines import Closed, LineReader
from trainyard_agent.logpump import LONGEST_LINE, LogPump
from trainyard_agent.settings import Settings, SettingsError, parse_command

ENV = {
    "TRAINYARD_RUN_UID": "r",
    "TRAINYARD_POD_NAME": "p",
    "TRAINYARD_POD_UID": "u",
    "TRAINYARD_POD_IP": "10.0.0.1",
    "TRAINYARD_NODE_INDEX": "1",
    "TRAINYARD_COORDINATOR_URL": "https://c:1/",
    "TRAINYARD_COORDINATOR_CA": "PEM",
    "TRAINYARD_COMMAND": '["train.py", "--x"]',
    "TRAINYARD_ATTEMPT": "9",
}


# ---- settings ---------------------------------------------------------------------------------------------


def test_settings_and_their_defaults() -> None:
    settings = Settings.from_env(ENV | {"TRAINYARD_PRELOAD": "a, b.c,", "TRAINYARD_ZYGOTE": "OFF"})
    assert (settings.node_index, settings.procs_per_node, settings.coordinator_url) == (1, 1, "https://c:1")
    assert settings.command == ("train.py", "--x") and settings.preload == ("a", "b.c")
    assert not settings.use_zygote and Settings.from_env(ENV).use_zygote
    assert str(settings.agent_socket) == "/trainyard/agent.sock" and settings.checkpoint_uri == ""
    assert str(settings.termination_log) == "/dev/termination-log" and settings.lonely_seconds == 600


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRAINYARD_POD_UID", ""),
        ("TRAINYARD_NODE_INDEX", "-1"),
        ("TRAINYARD_NODE_INDEX", "x"),
        ("TRAINYARD_GRACE_SECONDS", "nan"),
        ("TRAINYARD_COORDINATOR_URL", "ftp://c"),
        ("TRAINYARD_COMMAND", "train.py"),
        ("TRAINYARD_COMMAND", "[]"),
        ("TRAINYARD_COMMAND", '["-m"]'),
        ("TRAINYARD_COMMAND", "[1]"),
    ],
)
def test_settings_name_what_is_wrong(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        Settings.from_env(ENV | {name: value})


def test_workers_cannot_see_the_way_to_the_coordinator() -> None:
    env = Settings.from_env(ENV).worker_env(ENV)
    assert not {"TRAINYARD_COORDINATOR_URL", "TRAINYARD_COORDINATOR_CA", "TRAINYARD_TOKEN_FILE"} & set(env)
    assert "TRAINYARD_ATTEMPT" not in env and "TRAINYARD_UPLOADER_SOCKET" not in env
    assert env["TRAINYARD_POD_UID"] == "u" and env["TRAINYARD_AGENT_SOCKET"] == "/trainyard/agent.sock"
    saving = ENV | {"TRAINYARD_CHECKPOINT_URI": "s3://b/p"}
    assert (
        Settings.from_env(saving).worker_env(saving)["TRAINYARD_UPLOADER_SOCKET"]
        == "/trainyard/uploader.sock"
    )


def test_command_of_a_module() -> None:
    assert parse_command('["-m", "pkg.train", "--lr", "1"]') == ("-m", "pkg.train", "--lr", "1")


# ---- client and inbox ---------------------------------------------------------------------------------------


class Agent:
    """An inbox with nothing behind it."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ty-")  # a socket's path is short
        self.path = Path(self.folder.name) / "agent.sock"
        self.selector = selectors.DefaultSelector()
        self.messages: list[dict[str, Any]] = []
        self.inbox = Inbox(self.path, self.selector, self.messages.append)

    def hear(self, count: int) -> list[dict[str, Any]]:
        """Until `count` messages are there, at most 5 seconds."""
        deadline = time.monotonic() + 5
        while len(self.messages) < count and time.monotonic() < deadline:
            for key, _ in self.selector.select(0.05):
                key.data()
        return self.messages

    def close(self) -> None:
        self.inbox.close()
        self.selector.close()
        self.folder.cleanup()


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.close()


def test_client_sends_the_first_and_the_last_step_and_few_between(agent: Agent) -> None:
    client = AgentClient(str(agent.path), attempt=3, local_rank=0)
    client.resumed(5, "s3://b/c", "one is damaged")
    for step in range(1, 101):
        client.progress(step, 100, epoch=1, loss=float("inf"), samples_per_second=2.5)
    heard = agent.hear(3)
    assert heard[0] == {
        "op": "resumed", "step": 5, "uri": "s3://b/c", "fell_back": "one is damaged", "attempt": 3, "local_rank": 0,
    }  # fmt: skip
    steps = [m["step"] for m in heard[1:]]
    assert steps[0] == 1 and steps[-1] == 100 and len(steps) < 10
    assert heard[1]["loss"] is None and heard[1]["samples_per_second"] == 2.5 and heard[1]["time"] > 1e9
    client.close()


def test_client_sends_what_it_held_back_when_it_is_closed(agent: Agent) -> None:
    client = AgentClient(str(agent.path), attempt=1, local_rank=0)
    for step in (1, 2, 3):
        client.progress(step)
    client.close()
    assert [m["step"] for m in agent.hear(2)] == [1, 3]


def test_only_local_rank_0_is_heard_and_forks_keep_quiet(agent: Agent) -> None:
    quiet = AgentClient(str(agent.path), attempt=1, local_rank=1)
    quiet.progress(1)
    quiet.resumed(1)
    quiet.close()
    client = AgentClient(str(agent.path), attempt=1, local_rank=0)
    client.progress(1)
    agent.hear(1)
    child = os.fork()
    if child == 0:
        try:
            client._sent_at = float("-inf")
            client.progress(2)
            client.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    client.close()
    assert [m["step"] for m in agent.hear(1)] == [1]


def test_client_never_raises_and_never_blocks(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = AgentClient("/nonexistent/agent.sock", attempt=1, local_rank=0)
    nobody.progress(1)
    nobody.close()
    client = AgentClient(str(agent.path), attempt=1, local_rank=0)
    for step in range(20000):  # nobody reads: far more than a socket holds
        client._sent_at = float("-inf")
        client.progress(step)
    agent.hear(100)
    client._sent_at = float("-inf")
    client.progress(20001)
    client.close()
    agent.hear(10**6) if not agent.messages else None
    steps = [m["step"] for m in agent.messages]
    assert steps == sorted(steps) and steps[0] == 0
    monkeypatch.delenv("TRAINYARD_AGENT_SOCKET", raising=False)
    assert AgentClient.from_env() is None
    monkeypatch.setenv("TRAINYARD_AGENT_SOCKET", str(agent.path))
    monkeypatch.setenv("TRAINYARD_ATTEMPT", "4")
    assert AgentClient.from_env() is not None


@pytest.mark.parametrize("nonsense", [b"not json\n", b"[1]\n", b"x" * 70000])
def test_peer_that_talks_nonsense_is_cut_off(agent: Agent, nonsense: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(agent.path))
        peer.sendall(nonsense)
        peer.settimeout(0.0)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            for key, _ in agent.selector.select(0.05):
                key.data()
            try:
                assert peer.recv(10) == b""
                break
            except BlockingIOError:
                continue
        else:
            pytest.fail("not cut off within 5 s")
    assert agent.messages == []


def test_socket_that_an_earlier_agent_left_is_replaced(agent: Agent) -> None:
    path = agent.path.with_name("other.sock")
    listen(path).close()
    server = listen(path)
    assert oct(path.stat().st_mode & 0o777) == "0o600"
    server.close()


# ---- launch requests ------------------------------------------------------------------------------------------


def test_launch_request_crosses_with_its_descriptors() -> None:
    request = LaunchRequest(
        attempt=3, run_id="r-3", node_rank=1, nodes=4, procs_per_node=2, master_addr="10.0.0.1", master_port=29503,
        local_addr="10.0.0.2", work_dir="/x", agent_pid=1, fork=True, env={"A": "ü" * 30000},
    )  # fmt: skip
    assert (request.first_rank, request.world_size) == (2, 8)
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    with ours, theirs:
        sender = threading.Thread(target=send_request, args=(ours, request, [write_end, read_end]))
        sender.start()  # more than a socket holds: it ends when the other side reads
        received = receive_request(theirs)
        sender.join(5)
        assert received is not None
        got, fds = received
        assert got == request and len(fds) == 2
        os.write(fds[0], b"through")
        assert os.read(read_end, 10) == b"through"
        ours.close()
        assert receive_request(theirs) is None
    for fd in (read_end, write_end, *fds):
        os.close(fd)


# ---- log --------------------------------------------------------------------------------------------------


def test_log_has_whole_lines_with_their_rank() -> None:
    pump = LogPump()
    out_r, out_w = os.pipe()
    pump.start()
    writers = []
    for rank in (0, 11):
        read_end, write_end = os.pipe()
        pump.add(read_end, rank, out_w)
        writers.append(write_end)
    os.write(writers[0], b"half a ")
    os.write(writers[1], b"other\n\nlines\n")
    os.write(writers[0], b"line\n")
    os.write(writers[1], b"z" * (LONGEST_LINE // 2))
    time.sleep(0.05)
    os.write(writers[1], b"z" * (LONGEST_LINE // 2 + 5))
    os.write(writers[0], b"no newline")
    collected = b""
    os.close(writers[0])
    while b"no newline\n" not in collected:
        collected += os.read(out_r, 1 << 20)
    pump.stop(5)
    os.close(writers[1])
    os.close(out_w)
    while part := os.read(out_r, 1 << 20):
        collected += part
    os.close(out_r)
    lines = collected.decode().splitlines()
    assert "[rank 0] half a line" in lines and "[rank 0] no newline" in lines
    assert [line for line in lines if line.startswith("[rank 11]")][:3] == [
        "[rank 11] other",
        "[rank 11] ",
        "[rank 11] lines",
    ]
    assert f"[rank 11] {'z' * LONGEST_LINE}" in lines


def test_line_reader() -> None:
    read_end, write_end = os.pipe()
    reader = LineReader(read_end)
    os.write(write_end, b'{"a": 1}\n{"b"')
    assert reader.read() == [{"a": 1}]
    os.write(write_end, b": 2}\n\n")
    assert reader.read() == [{"b": 2}]
    os.write(write_end, json.dumps({"c": 3}).encode())
    assert reader.read() == []
    os.close(write_end)
    with pytest.raises(Closed):
        reader.read()
    os.close(read_end)
