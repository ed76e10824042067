"""kill -9 at any step, go on: the same weights, bit by bit, and each sample of each epoch exactly once."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from tests.trainer.forkhost import PYTHONPATH, ROOT, Host, Rank

DIGITS = str(ROOT / "examples/digits/train.py")
SMALL = ["--epochs", "2", "--hidden", "8", "--batch-size", "60", "--step-delay", "0.02"]
TRAINED_ON = [i for i in range(len(load_digits().target)) if i % 5]


class Story:
    """One run over several attempts: what was trained on, with what was lost to a kill taken away again."""

    def __init__(self, host: Host, env: dict[str, str], folder: Path, argv: list[str]) -> None:
        self.host, self.env, self.folder, self.argv = host, env, folder, argv
        self.attempts = 0
        self.lines: list[dict[str, int | list[int]]] = []
        self.resumed_at: list[int] = []

    def attempt(self, world: int, *, kill_at: int | None = None, victim: int = 0) -> list[Rank]:
        self.attempts += 1
        log = self.folder / f"samples-{self.attempts}"
        env = {**self.env, "TRAINYARD_ATTEMPT": str(self.attempts)}
        ranks = self.host.start([DIGITS, *SMALL, *self.argv, "--sample-log", str(log)], world=world, env=env)
        if kill_at is not None:
            wait_for_step(log / f"rank-{victim}.jsonl", kill_at, ranks[victim])
            ranks[victim].kill()
        codes = self.host.wait(ranks, 60)
        assert (codes[victim] == -9) if kill_at is not None else not any(codes), ranks[0].output[-2000:]
        found = re.search(r"resumed at step (\d+)", ranks[0].output)
        start = int(found[1]) if found else 0
        self.resumed_at.append(start)
        self.lines = [line for line in self.lines if line["step"] <= start]
        self.lines += [json.loads(t) for file in sorted(log.glob("*")) for t in whole_lines(file)]
        return ranks

    def samples(self, epoch: int) -> Counter[int]:
        return Counter(i for line in self.lines if line["epoch"] == epoch for i in line["ids"])  # type: ignore[union-attr]


def whole_lines(file: Path) -> list[str]:
    text = file.read_text() if file.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def wait_for_step(log: Path, step: int, rank: Rank) -> None:
    end = time.monotonic() + 60
    while not any(json.loads(line)["step"] >= step for line in whole_lines(log)):
        assert time.monotonic() < end, f"step {step} was not reached\n{rank.output[-2000:]}"
        time.sleep(0.005)


def weights(ranks: list[Rank]) -> str:
    found = re.search(r"final weights sha256=([0-9a-f]{64})", ranks[0].output)
    assert found, ranks[0].output[-2000:]
    return found[1]


@pytest.mark.parametrize(
    ("world", "argv"),
    [(2, []), (2, ["--workers", "2", "--accumulate", "2"]), (1, ["--accumulate", "3"])],
    ids=["2 ranks", "2 ranks, loader workers, accumulation", "1 rank"],
)
def test_killed_run_ends_like_an_unbroken_one(
    host: Host, run_env: dict[str, str], tmp_path: Path, world: int, argv: list[str]
) -> None:
    steps = 2 * -(-len(TRAINED_ON) // (60 * world * int(argv[-1] if argv else 1)))
    unbroken = host.start(
        [DIGITS, *SMALL, *argv], world=world, env={**run_env, "TRAINYARD_RUN_UID": "unbroken"}
    )
    host.wait(unbroken)
    dice = random.Random(f"{world} {argv}")
    story = Story(host, run_env, tmp_path, argv)
    for _ in range(3):
        start = story.resumed_at[-1] if story.resumed_at else 0
        story.attempt(world, kill_at=dice.randint(start + 1, steps - 1), victim=dice.randrange(world))
    end = story.attempt(world)
    assert weights(end) == weights(unbroken)
    assert story.samples(0) == story.samples(1) == Counter(TRAINED_ON)
    assert any(story.resumed_at), "no attempt had anything to resume from: the test shows nothing"


def test_world_size_may_change(host: Host, run_env: dict[str, str], tmp_path: Path) -> None:
    story = Story(host, run_env, tmp_path, [])
    story.attempt(2, kill_at=8)
    story.attempt(1, kill_at=story_step(2, 17))
    story.attempt(3)
    assert story.samples(0) == story.samples(1) == Counter(TRAINED_ON)
    assert all(story.resumed_at[1:])


def story_step(world: int, step: int) -> int:
    """A step of a gang of one that is well inside its run."""
    return step * world // 2


def test_without_the_generators_it_would_differ(host: Host, run_env: dict[str, str], tmp_path: Path) -> None:
    """The other tests could not fail if nothing random happened between a save and the end."""
    script = tmp_path / "forgetful.py"
    script.write_text(
        f"import runpy, sys\nimport trainyard.trainer.restoring as p\np.set_rng_state = lambda state: None\n"
        f"sys.argv[0] = {DIGITS!r}\nrunpy.run_path({DIGITS!r}, run_name='__main__')\n"
    )
    unbroken = host.start([DIGITS, *SMALL], env={**run_env, "TRAINYARD_RUN_UID": "unbroken"})
    host.wait(unbroken)
    story = Story(host, run_env, tmp_path, [])
    story.attempt(1, kill_at=12)
    forgetful = host.run([str(script), *SMALL], env={**run_env, "TRAINYARD_ATTEMPT": "2"})
    assert weights(forgetful) != weights(unbroken)


def test_under_torchrun(host: Host, run_env: dict[str, str], tmp_path: Path) -> None:
    unbroken = host.start([DIGITS, *SMALL], world=2, env={**run_env, "TRAINYARD_RUN_UID": "unbroken"})
    host.wait(unbroken)
    log = tmp_path / "samples"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", DIGITS]
    env = {**os.environ, **run_env, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    output = tmp_path / "torchrun.log"
    with output.open("w") as file:
        torchrun = subprocess.Popen(
            [*command, *SMALL, "--sample-log", str(log)],
            env=env,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            wait_for_step(log / "rank-1.jsonl", 10, Rank(torchrun.pid, output))
            os.killpg(torchrun.pid, signal.SIGKILL)
        finally:
            torchrun.kill()
            torchrun.wait(20)
        for pid in worker_pids(str(log)):  # torchrun puts its workers into sessions of their own
            os.kill(pid, signal.SIGKILL)
    again = host.run([DIGITS, *SMALL], world=2, env={**run_env, "TRAINYARD_ATTEMPT": "2"})
    assert "resumed at step" in again[0].output
    assert weights(again) == weights(unbroken)


def worker_pids(mark: str) -> list[int]:
    """Processes whose command line has `mark` in it, this test's own folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in command:
            found.append(int(entry.name))
    return found
