"""The real torchrun, one agent or two ("nodes" on loopback): a stop from outside, and an error inside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.forkhost import PYTHONPATH, ROOT, Host
from tests.trainer.pods import free_port, processes_with, wait_until

SCRIPT = str(ROOT / "tests/trainer/failing.py")
BOUND_SECONDS = 120
"""Of what lasts seconds on an idle machine; torchrun alone would wait for 30 s, and a collective for 30 minutes."""
MARK = "TRAINYARD_TEST_MARK"


class Torchrun:
    """The agents of one run, each of a node."""

    def __init__(self, folder: Path, argv: list[str], *, nodes: int, per_node: int, **env: str) -> None:
        self.mark = f"{MARK}={folder.name}-{free_port()}"
        port = str(free_port())
        environment = {
            **os.environ, "PYTHONPATH": f"{PYTHONPATH}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "TRAINYARD_GRACE_SECONDS": "60", MARK: self.mark.partition("=")[2], **env,
        }  # fmt: skip
        self.logs = [folder / f"node-{n}.log" for n in range(nodes)]
        self.agents = []
        for node, log in enumerate(self.logs):
            with log.open("w") as output:
                command = [
                    sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={per_node}",
                    f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}", "--max-restarts=0", SCRIPT,
                    *argv,
                ]  # fmt: skip
                self.agents.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )

    @property
    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def wait(self) -> list[int]:
        try:
            return [agent.wait(BOUND_SECONDS) for agent in self.agents]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun still runs\n{self.output[-6000:]}") from None

    def close(self) -> None:
        for pid in processes_with(self.mark):
            os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.wait(20)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[Torchrun]]:
    found: list[Torchrun] = []
    yield found
    for run in found:
        run.close()


def weights(output: str) -> str:
    found = re.search(r"steps 12 weights ([0-9a-f]{64})", output)
    assert found, output[-3000:]
    return found[1]


@pytest.mark.parametrize(
    ("what", "nodes", "per_node"), [("SIGTERM", 2, 1), ("SIGTERM to the launcher", 1, 2)],
    ids=["one rank of two nodes", "torchrun itself"],
)  # fmt: skip
def test_stop_is_saved_and_resumed(
    host: Host, tmp_path: Path, runs: list[Torchrun], what: str, nodes: int, per_node: int
) -> None:
    uri = (tmp_path / "checkpoints").as_uri()
    run = Torchrun(tmp_path, [what, "1"], nodes=nodes, per_node=per_node, FAILING_CHECKPOINTS=uri)
    runs.append(run)
    codes = run.wait()
    assert all(codes), run.output[-3000:]
    found = re.search(r"SIGTERM to rank [01]: stopping after step (\d+), saving", run.output)
    assert found, run.output[-3000:]
    wait_until(lambda: not processes_with(run.mark), "the ranks to be gone")
    env = {"FAILING_CHECKPOINTS": uri}
    resumed = host.run([SCRIPT, "nothing", "0"], world=2, env=env)[0]
    unbroken = host.run([SCRIPT, "nothing", "0"], world=2)[0]
    assert f"resumed at step {found[1]} " in resumed.output
    assert weights(resumed.output) == weights(unbroken.output)


def test_torchrun_names_the_rank_that_failed(tmp_path: Path, runs: list[Torchrun]) -> None:
    """On the other node too, whose own rank has only lost its connection."""
    run = Torchrun(tmp_path, ["validation_step", "1"], nodes=2, per_node=1)
    runs.append(run)
    assert all(run.wait())
    for log in run.logs:
        report = log.read_text().partition("Root Cause")[2]
        assert "ValueError: no luck in validation_step" in report, log.read_text()[-4000:]
    assert "exitcode  : 1" in run.output
    wait_until(lambda: not processes_with(run.mark), "the ranks to be gone")
