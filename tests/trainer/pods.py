"""Pods of processes: real agents on loopback, each with its own folder, against the fake coordinator."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

from tests.trainer.fake_coordinator import FakeCoordinator
from trainyard_api.contract import Env
from trainyard_api.protocol import Action, AgentPhase, Beat, Directive

ROOT = Path(__file__).parents[2]
MARK = "TRAINYARD_TEST_MARK"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_with(mark: str) -> dict[int, str]:
    """PID and name of every process (zombies are not counted) whose first environment has `mark`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "comm").read_text().strip()
    return found


def wait_until(wanted, what: str, bound: float = 20.0):
    """What `wanted()` gives when it is true. Raises AssertionError that says `what` was waited for."""
    deadline = time.monotonic() + bound
    while not (value := wanted()):
        assert time.monotonic() < deadline, f"waited {bound:g} s for {what}"
        time.sleep(0.01)
    return value


class Pod:
    """One agent process."""

    def __init__(self, coordinator: FakeCoordinator, script: Path, *, index: int = 0, **env: str) -> None:
        self.coordinator = coordinator
        self.folder = Path(tempfile.mkdtemp(prefix="ty-"))
        self.uid = str(uuid.uuid4())
        self.log = self.folder / "pod.log"
        self.termination_log = self.folder / "termination"
        token = self.folder / "token"
        token.write_text(coordinator.token)
        contract = {
            Env.RUN_NAME: "demo",
            Env.RUN_NAMESPACE: "team",
            Env.RUN_UID: "11111111-2222-3333-4444-555555555555",
            Env.POD_NAME: f"demo-{index}-1",
            Env.POD_UID: self.uid,
            Env.POD_IP: "127.0.0.1",
            Env.NODE_INDEX: str(index),
            Env.COORDINATOR_URL: coordinator.url,
            Env.TOKEN_FILE: str(token),
            Env.COMMAND: json.dumps([str(script)]),
            Env.RUNTIME_DIR: str(self.folder),
            Env.GRACE_SECONDS: "8",
        }
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("TRAINYARD_", "PYTEST_"))} | {
            **{str(k): v for k, v in contract.items()},
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("operator", "trainer-image")),
            "TRAINYARD_TERMINATION_LOG": str(self.termination_log),
            MARK: self.uid,
            **env,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainyard_agent"],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, wanted, *, bound: float = 60.0, since: float = 0.0) -> tuple[float, Beat]:
        try:
            return self.coordinator.wait_for(self.uid, wanted, bound=bound, since=since)
        except AssertionError as error:
            raise AssertionError(f"{error}\nlog of the pod:\n{self.text()}") from None

    def phase(self, phase: AgentPhase, attempt: int, *, bound: float = 60.0) -> Beat:
        return self.wait(lambda b: b.phase == phase and b.attempt == attempt, bound=bound)[1]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def termination(self) -> dict[str, object]:
        # The file is a mount point in a real pod, so it is rewritten in place: it may be empty for a moment.
        deadline = time.monotonic() + 2
        while True:
            text = self.termination_log.read_text() if self.termination_log.exists() else ""
            if text or time.monotonic() > deadline:
                return json.loads(text) if text else {}
            time.sleep(0.01)

    def processes(self) -> dict[int, str]:
        """Without the agent."""
        return {pid: name for pid, name in processes_with(self.uid).items() if pid != self.process.pid}

    def named(self, name: str) -> int:
        """PID of the one process of this pod that is called `name` (zygote, launcher, rank0, ...)."""
        (pid,) = wait_until(
            lambda: [pid for pid, comm in self.processes().items() if comm == name], f"a process named {name}"
        )
        return pid

    def exit_code(self, bound: float = 15.0) -> int:
        return self.process.wait(bound)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        for _ in range(200):
            left = self.processes()
            if not left:
                break
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        shutil.rmtree(self.folder, ignore_errors=True)


class Gang:
    """The pods of one run, one script for all, and attempts that count up."""

    def __init__(self, pods: int, *, procs: int = 1, **env: str) -> None:
        self.coordinator = FakeCoordinator()
        self.shared = Path(tempfile.mkdtemp(prefix="ty-"))
        self.script = self.shared / "train.py"
        self.procs = procs
        self.attempt = 0
        self.pods = [
            Pod(self.coordinator, self.script, index=i, TEST_SHARED=str(self.shared), **env)
            for i in range(pods)
        ]

    def warm(self) -> None:
        for pod in self.pods:
            pod.wait(lambda b: b.ready)

    def hold(self) -> int:
        """The next attempt is held; its number."""
        self.attempt += 1
        for pod in self.pods:
            self.coordinator.direct(
                pod.uid, Directive(action=Action.HOLD, attempt=self.attempt, reason="test")
            )
        return self.attempt

    def run(self, script: str | None = None, *, attempt: int | None = None, procs: int | None = None) -> int:
        """The next attempt (or this one) runs; its number."""
        if script is not None:
            self.script.write_text(script)
        self.attempt = self.attempt + 1 if attempt is None else attempt
        port = free_port()
        for index, pod in enumerate(self.pods):
            self.coordinator.direct(
                pod.uid,
                Directive(
                    action=Action.RUN,
                    attempt=self.attempt,
                    node_rank=index,
                    nodes=len(self.pods),
                    procs_per_node=procs or self.procs,
                    master_addr="127.0.0.1",
                    master_port=port,
                ),
            )
        return self.attempt

    def exit(self, code: int = 0) -> None:
        for pod in self.pods:
            directive = Directive(action=Action.EXIT, attempt=self.attempt, exit_code=code, reason="test")
            self.coordinator.direct(pod.uid, directive)

    def close(self) -> None:
        for pod in self.pods:
            pod.close()
        self.coordinator.down()
        shutil.rmtree(self.shared, ignore_errors=True)


TRAIN = """
import os, time
import torch, torch.distributed as dist
from trainyard.elastic.client import AgentClient
dist.init_process_group("gloo")
client = AgentClient.from_env()
client.resumed(0)
print("rank", dist.get_rank(), "of", dist.get_world_size())
STEPS = int(os.environ.get("TEST_STEPS", 100000))
for step in range(1, STEPS + 1):
    x = torch.ones(100)
    dist.all_reduce(x)
    assert x[0].item() == dist.get_world_size()
    client.progress(step, STEPS, loss=1.0 / step)
    time.sleep(0.02)
"""
"""Trains until it is killed: one all_reduce a step."""
