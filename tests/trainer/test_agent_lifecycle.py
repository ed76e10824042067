"""How an agent begins and ends, and what becomes of its children: real processes, one pod a test."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.trainer.pods import TRAIN, Gang, Pod, processes_with, wait_until
from trainyard.checkpoint.messages import Staged
from trainyard_api.checkpoints import Record, shard_key
from trainyard_api.protocol import AgentPhase

OFF = {"TRAINYARD_ZYGOTE": "off"}


@pytest.fixture
def one_pod() -> Iterator[Callable[..., Gang]]:
    gangs: list[Gang] = []

    def make(**env: str) -> Gang:
        gangs.append(Gang(1, **env))
        return gangs[-1]

    yield make
    for gang in gangs:
        gang.close()


def training(gang: Gang) -> tuple[Pod, int]:
    gang.warm()
    attempt = gang.run(
        "import os, torch\nassert torch.get_num_threads() == int(os.environ['OMP_NUM_THREADS'])\n" + TRAIN
    )
    gang.pods[0].phase(AgentPhase.RUNNING, attempt)
    return gang.pods[0], attempt


def nothing_left(pod: Pod) -> None:
    wait_until(
        lambda: not processes_with(pod.uid), f"no process of the pod, not {processes_with(pod.uid)}", bound=5
    )


def commit_one(pod: Pod, step: int) -> None:
    """Stages a shard as a worker of attempt 1 would, and waits until the uploader says that it is committed."""
    staging = pod.folder / "staging"
    path = staging / shard_key(step, 1, 0, 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    head = Record(
        kind="commit",
        seq=0,
        run=pod.env["TRAINYARD_RUN_UID"],
        attempt=1,
        step=step,
        time=time.time(),
        world_size=1,
    )
    staged = Staged(attempt=1, step=step, rank=0, world=1, path=str(path), size=7, record=head)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        wait_until(
            lambda: connection.connect_ex(str(pod.folder / "uploader.sock")) == 0, "the uploader's socket"
        )
        connection.sendall(staged.line())
        with connection.makefile() as answers:
            assert any(json.loads(line)["op"] == "committed" for line in answers)


def uploader_pid(pod: Pod) -> int | None:
    for pid in pod.processes():
        with suppress(OSError):
            if b"trainyard.checkpoint.uploader" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def test_killed_agent_takes_everything_with_it(one_pod: Callable[..., Gang]) -> None:
    gang = one_pod(OMP_NUM_THREADS="3")
    pod, _ = training(gang)
    assert {"zygote", "launcher", "rank0"} <= set(pod.processes().values())
    pod.process.kill()
    nothing_left(pod)


def test_sigterm_drains(one_pod: Callable[..., Gang], tmp_path) -> None:
    gang = one_pod(TRAINYARD_CHECKPOINT_URI=tmp_path.as_uri(), OMP_NUM_THREADS="2")
    pod, attempt = training(gang)
    wait_until(lambda: uploader_pid(pod), "the uploader")
    pod.process.send_signal(signal.SIGTERM)
    pod.phase(AgentPhase.DRAINING, attempt, bound=5)
    assert pod.exit_code() == 0
    nothing_left(pod)
    said = pod.termination()
    assert (said["outcome"], said["attempt"], said["exitCode"]) == ("draining", attempt, 0)
    assert isinstance(said["step"], int) and said["step"] >= 1
    assert len(pod.termination_log.read_bytes()) < 4096


def test_gone_run_ends_the_agent_and_its_workers(one_pod: Callable[..., Gang]) -> None:
    gang = one_pod(OMP_NUM_THREADS="1")
    pod, _ = training(gang)
    gang.coordinator.status = 410
    assert pod.exit_code() == 0
    nothing_left(pod)


def test_without_a_zygote_the_same_happens_only_slower(one_pod: Callable[..., Gang]) -> None:
    gang = one_pod(**OFF)
    pod = gang.pods[0]
    pod.wait(lambda b: b.ready)
    attempt = gang.run("import sys\nprint('hello')\nsys.exit(78)\n", procs=2)
    failure = pod.phase(AgentPhase.FAILED, attempt).failure
    assert failure is not None and (failure.exit_code, failure.exception) == (78, "SystemExit")
    assert failure.rank in (0, 1)
    wait_until(lambda: f"[rank {failure.rank}] hello" in pod.text(), "the worker's output")
    attempt = gang.run(
        "import os\nprint('again', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n", procs=2
    )
    pod.phase(AgentPhase.SUCCEEDED, attempt)
    for rank in (0, 1):
        wait_until(lambda rank=rank: f"[rank {rank}] again {rank} of 2" in pod.text(), "the workers' output")
    gang.exit(5)
    assert pod.exit_code() == 5
    nothing_left(pod)
    assert pod.termination()["outcome"] == "succeeded"


def test_unfit_zygote_is_replaced_by_fresh_processes_and_a_lonely_agent_tells_the_truth(
    one_pod: Callable[..., Gang], tmp_path
) -> None:
    (tmp_path / "with_a_thread.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()\n"
    )
    gang = one_pod(TRAINYARD_PRELOAD="with_a_thread, not_there", TRAINYARD_LONELY_SECONDS="0.5")
    # The preloaded modules are found where the script's are.
    (gang.shared / "with_a_thread.py").write_text((tmp_path / "with_a_thread.py").read_text())
    pod = gang.pods[0]
    pod.wait(lambda b: b.ready)
    beat = pod.wait(lambda b: bool(b.warnings))[1]
    assert any("cannot preload not_there: ModuleNotFoundError" in w for w in beat.warnings)
    attempt = gang.run("raise SystemExit(79)\n")
    failure = pod.phase(AgentPhase.FAILED, attempt).failure
    assert failure is not None and (failure.rank, failure.exit_code) == (0, 79)
    beat = pod.wait(lambda b: any("2 threads" in w for w in b.warnings))[1]
    assert beat.ready
    gang.coordinator.down()
    assert pod.exit_code() == 79
    said = pod.termination()
    assert (said["outcome"], said["exitCode"], said["attempt"], said["rank"]) == ("failed", 79, attempt, 0)
    nothing_left(pod)


def test_uploader_is_started_again_and_its_commits_are_reported(
    one_pod: Callable[..., Gang], tmp_path
) -> None:
    gang = one_pod(TRAINYARD_CHECKPOINT_URI=tmp_path.as_uri(), **OFF)
    pod = gang.pods[0]
    commit_one(pod, 10)
    beat = pod.wait(lambda b: b.checkpoint is not None)[1]
    assert (beat.checkpoint.step, beat.checkpoint.seq) == (10, 1)
    before = uploader_pid(pod)
    os.kill(before, signal.SIGKILL)
    pod.wait(lambda b: any("uploader ended with SIGKILL" in w for w in b.warnings))
    wait_until(lambda: uploader_pid(pod) not in (None, before), "another uploader")
    commit_one(pod, 20)
    beat = pod.wait(lambda b: b.checkpoint is not None and b.checkpoint.step == 20)[1]
    assert "commits/00000002.json" in beat.checkpoint.uri
    gang.exit(0)
    assert pod.exit_code() == 0
    nothing_left(pod)


def test_refused_agent_ends_when_it_is_idle(one_pod: Callable[..., Gang]) -> None:
    gang = one_pod(TRAINYARD_AUTH_SECONDS="0.5", **OFF)
    gang.coordinator.token = "another"
    pod = gang.pods[0]
    assert pod.exit_code() == 1
    assert "401" in str(pod.termination()["message"])
    assert "secret-token" not in pod.text()


def test_token_is_read_again_for_each_beat(one_pod: Callable[..., Gang]) -> None:
    gang = one_pod(**OFF)
    pod = gang.pods[0]
    pod.wait(lambda b: b.ready)
    (pod.folder / "token").write_text("rotated")
    gang.coordinator.token = "rotated"
    pod.wait(lambda b: True, since=time.time() + 0.5)


def test_incomplete_environment_is_a_clear_error(tmp_path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRAINYARD_")}
    env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TRAINYARD_RUN_UID": "u"}
    env |= {"TRAINYARD_TERMINATION_LOG": str(tmp_path / "termination")}
    ended = subprocess.run(
        [sys.executable, "-m", "trainyard_agent"],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 78
    assert "TRAINYARD_POD_NAME is not set" in ended.stderr and "Traceback" not in ended.stderr
    assert json.loads((tmp_path / "termination").read_text())["outcome"] == "misconfigured"
