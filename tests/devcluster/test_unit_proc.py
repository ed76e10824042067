"""Processes: known by pid and start time, so that no stranger is ever signalled."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from devcluster.filelock import locked
from devcluster.proc import Process, start_time

SLEEP = ["sleep", "1000"]


def make(folder: Path) -> Process:
    return Process("sleeper", folder / "pids", folder / "sleeper.log")


def test_start_and_stop(tmp_path: Path) -> None:
    process = make(tmp_path)
    assert not process.running
    process.start(SLEEP)
    assert process.runs_as(SLEEP)
    assert not process.runs_as(["sleep", "1"])
    pid = process.pid
    assert pid
    process.stop()
    assert not process.running
    assert start_time(pid) is None
    assert not process.record.exists()


def test_a_stranger_with_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    process = make(tmp_path)
    process.start(SLEEP)
    fields = process.record.read_text().split()
    other = make(tmp_path / "other")
    other.record.parent.mkdir(parents=True)
    # The 22nd field is the start time.
    other.record.write_text(" ".join([*fields[:21], str(int(fields[21]) - 1), *fields[22:]]))
    assert not other.running
    other.stop()
    assert process.running
    process.stop()


def test_what_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process = make(tmp_path)
    process.start(["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
    time.sleep(0.1)
    process.stop(seconds=0.3)
    assert not process.running


def test_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from devcluster.proc import Process;"
        f"Process('s', Path({str(tmp_path)!r}), Path({str(tmp_path / 'log')!r})).start(['sleep', '1000'], dies_with_parent=True);"
        "print('started', flush=True); time.sleep(1000)"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"started\n"
    child = Process("s", tmp_path, tmp_path / "log")
    assert child.running
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while child.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not child.running


def test_a_lock_leaves_no_file_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "a test", remove=True):
        assert path.exists()
    assert not path.exists()
