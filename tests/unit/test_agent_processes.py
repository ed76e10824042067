"""Who belongs to an attempt, and that nobody of them survives: on a table, and on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from trainyard_agent.processes import Process, belonging, is_marked, kill_all, parse_stat, snapshot


def table(*rows: tuple[int, int, int]) -> dict[int, Process]:
    return {pid: Process(pid, ppid, session, "S", f"p{pid}") for pid, ppid, session in rows}


# 1 agent; 2 zygote; 3 uploader and its child 30; 10 launcher with workers 11, 12; 13 grandchild in its own session;
# 20 an orphan that left session and environment behind, with a child 21; 40 a stranger (kubectl exec) with a child.
ROWS = table(
    (1, 0, 1), (2, 1, 1), (3, 1, 1), (30, 3, 1), (10, 1, 10), (11, 10, 10), (12, 10, 10), (13, 11, 13),
    (20, 1, 20), (21, 20, 20), (40, 0, 40), (41, 40, 40), (50, 0, 10), (60, 41, 40),
)  # fmt: skip


def test_belonging() -> None:
    found = belonging(ROWS, agent=1, keep={2, 3}, launcher=10, marked={60})
    assert found == {10, 11, 12, 13, 20, 21, 50, 60}
    assert belonging(ROWS, agent=1, keep={2, 3, 10}, launcher=None, marked=()) == {20, 21}


def test_parse_stat_takes_any_name() -> None:
    assert parse_stat("7 (a) b (c) S 1 7 5 0 -1 4194560\n") == Process(7, 1, 5, "S", "a) b (c")
    with pytest.raises(ValueError):
        parse_stat("nonsense")


def test_mark_needs_the_pod_and_any_attempt() -> None:
    assert is_marked(b"A=1\0TRAINYARD_POD_UID=u\0TRAINYARD_ATTEMPT=3\0", "u")
    assert not is_marked(b"TRAINYARD_POD_UID=u\0", "u")
    assert not is_marked(b"TRAINYARD_POD_UID=uu\0TRAINYARD_ATTEMPT=3\0", "u")
    assert not is_marked(b"X=TRAINYARD_POD_UID=u\0TRAINYARD_ATTEMPT=3\0", "u")


KILLER = """
import os, signal, subprocess, sys, time
from trainyard_agent.prctl import become_subreaper
from trainyard_agent.processes import kill_all
become_subreaper()
loop = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.write(1, bytes([117, 112, 10])); time.sleep(1000)"
python = [sys.executable, "-S", "-c", loop]
kept = subprocess.Popen(python, stdout=subprocess.PIPE)
ups = [kept.stdout]
launcher = subprocess.Popen(
    [sys.executable, "-S", "-c", f"import subprocess, sys; a = {python!r}; "
     "subprocess.Popen(a); subprocess.Popen(a, start_new_session=True); subprocess.Popen(a).wait()"],
    stdout=subprocess.PIPE, start_new_session=True)
r, w = os.pipe()
if os.fork() == 0:  # a daemon: other session, no environment, no parent
    os.setsid()
    if os.fork() == 0:
        os.dup2(w, 1)
        os.execve(python[0], python, {})
    os._exit(0)
os.wait()
marked = subprocess.Popen(
    [sys.executable, "-S", "-c", f"import subprocess; subprocess.Popen({python!r}, start_new_session=True)"],
    stdout=subprocess.PIPE, env={"TRAINYARD_POD_UID": "uid-of-test", "TRAINYARD_ATTEMPT": "1"})
for stream, count in ((kept.stdout, 1), (launcher.stdout, 3), (os.fdopen(r, "rb"), 1), (marked.stdout, 1)):
    for _ in range(count):
        line = stream.readline()
        assert line == b"up\\n", line
def reap():
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
left = kill_all(keep={kept.pid}, launcher=launcher.pid, pod_uid="uid-of-test", reap=reap, bound=10)
mine = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout.split()
print(left, kept.poll(), str(kept.pid) in mine)
kept.kill()
kept.wait(5)
"""


def test_kill_all_leaves_only_what_is_to_be_kept() -> None:
    mark = f"kill-all-{uuid.uuid4()}"
    try:
        _kill_all(mark)
    finally:
        left = [pid for pid in snapshot() if _has_mark(pid, mark)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert left == []


def _kill_all(mark: str) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "MARK_OF_TEST": mark,
    }
    ended = subprocess.run(
        [sys.executable, "-c", KILLER], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[] None True\n"


def _has_mark(pid: int, mark: str) -> bool:
    with suppress(OSError):
        return mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    return False


def test_what_does_not_go_is_named_at_the_bound() -> None:
    # A dead child that nobody reaps stands for a process that SIGKILL does not end (state D cannot be made here).
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(1000)"], start_new_session=True
    )
    # Its session, not its parent, makes it belong: this test process may have other children.
    others = {row.pid for row in snapshot().values() if row.ppid == os.getpid() and row.pid != child.pid}
    begun = time.monotonic()
    left = kill_all(keep=others, launcher=child.pid, pod_uid="none", reap=lambda: None, bound=0.2)
    assert [(row.pid, row.state) for row in left] == [(child.pid, "Z")]
    assert time.monotonic() - begun >= 0.2
    assert child.wait(5) == -9
