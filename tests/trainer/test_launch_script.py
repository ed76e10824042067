"""`python train.py` with two devices: the script's own process is rank 0, and starts the other one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.trainer.forkhost import PYTHONPATH, ROOT, Host
from tests.trainer.pods import MARK, free_port, processes_with, wait_until

SCRIPT = str(ROOT / "tests/trainer/failing.py")
BOUND_SECONDS = 120


@dataclass
class Laptop:
    """Programs whose processes can be found again."""

    folder: Path

    def __post_init__(self) -> None:
        self.mark = f"{self.folder.name}-{free_port()}"
        self.env = {"TRAINYARD_GRACE_SECONDS": "60", MARK: self.mark}

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ, "PYTHONPATH": f"{PYTHONPATH}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **self.env, **env,
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, *arguments], env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def left(self) -> dict[int, str]:
        return processes_with(f"{MARK}={self.mark}")


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Laptop]:
    laptop = Laptop(tmp_path)
    yield laptop
    for pid in laptop.left():
        os.kill(pid, signal.SIGKILL)


def weights(output: str) -> str:
    found = re.search(r"steps 12 weights ([0-9a-f]{64})", output)
    assert found, output[-3000:]
    return found[1]


def test_module_is_run_again_for_the_other_rank(laptop: Laptop, host: Host) -> None:
    launched = host.run([SCRIPT, "nothing", "0"], world=2)[0]
    program = laptop.start("-m", "tests.trainer.failing", "nothing", "0", "ddp", "2")
    output = program.communicate(timeout=BOUND_SECONDS)[0]
    assert program.returncode == 0, output[-3000:]
    assert output.count("weights") == 1
    assert weights(output) == weights(launched.output)
    wait_until(lambda: not laptop.left(), "both ranks to be gone")


def test_sigterm_to_the_script_is_saved_by_all(laptop: Laptop, host: Host, tmp_path: Path) -> None:
    uri = (tmp_path / "checkpoints").as_uri()
    program = laptop.start(SCRIPT, "SIGTERM to the launcher", "1", "ddp", "2", FAILING_CHECKPOINTS=uri)
    output = program.communicate(timeout=BOUND_SECONDS)[0]
    assert program.returncode == 143, output[-3000:]
    assert "SIGTERM to rank 0: stopping after step" in output
    wait_until(lambda: not laptop.left(), "both ranks to be gone")
    resumed = host.run([SCRIPT, "nothing", "0"], world=2, env={"FAILING_CHECKPOINTS": uri})[0]
    unbroken = host.run([SCRIPT, "nothing", "0"], world=2)[0]
    assert "resumed at step" in resumed.output
    assert weights(resumed.output) == weights(unbroken.output)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("exit", "rank 1 failed: its process exited with code 3"),
        ("script", "rank 1 failed: its process exited with code 1"),
    ],
)  # fmt: skip
def test_failure_of_the_other_rank_ends_the_script(laptop: Laptop, host: Host, what: str, said: str) -> None:
    """The first one is a fork of the host, the other one a new process."""
    main = host.run([SCRIPT, what, "1", "ddp", "2"], env=laptop.env, seconds=BOUND_SECONDS)[0]
    assert main.code not in (0, None)
    assert said in main.output, main.output[-3000:]
    wait_until(lambda: not laptop.left(), "the other rank to be gone")


def test_other_rank_dies_with_the_script(laptop: Laptop, host: Host) -> None:
    main = host.run([SCRIPT, "SIGKILL", "0", "ddp", "2"], env=laptop.env, seconds=BOUND_SECONDS)[0]
    assert main.code == -9
    wait_until(lambda: not laptop.left(), "the other rank to be gone")


def test_spawned_ranks(laptop: Laptop, host: Host) -> None:
    launched = host.run([SCRIPT, "nothing", "0"], world=2)[0]
    main = host.run([SCRIPT, "nothing", "0", "ddp_spawn", "2"], env=laptop.env, seconds=BOUND_SECONDS)[0]
    assert weights(main.output) == weights(launched.output)
    wait_until(lambda: not laptop.left(), "the spawned ranks to be gone")
