"""A gang of two pods with two ranks each, restarted in place again and again: real agents, zygotes, torchelastic, gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.pods import TRAIN, Gang, Pod, free_port, wait_until
from trainyard_api.protocol import Action, AgentPhase, Beat, Directive

FAILS = """
import os, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 1:
    {what}
try:
    dist.barrier()
finally:
    print("peer was told")
"""


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    gang = Gang(2, procs=2)
    try:
        gang.warm()
        yield gang
    finally:
        gang.close()


def training(gang: Gang, script: str = TRAIN) -> int:
    """A new attempt in which every pod has taken a step; its number."""
    attempt = gang.run(script)
    for pod in gang.pods:
        pod.phase(AgentPhase.RUNNING, attempt)
    return attempt


def failure_of(pod: Pod, attempt: int) -> Beat:
    return pod.phase(AgentPhase.FAILED, attempt)


def test_killed_rank_is_named_and_the_next_attempt_runs_in_place(gang: Gang, capsys) -> None:
    attempt = training(gang)
    agents = [pod.process.pid for pod in gang.pods]
    figures = []
    for turn in range(3):
        victim = gang.pods[turn % 2]
        rank = 2 * (turn % 2) + 1
        killed = time.time()
        os.kill(victim.named(f"rank{rank}"), signal.SIGKILL)
        reported, beat = victim.wait(lambda b, n=attempt: b.phase == AgentPhase.FAILED and b.attempt == n)
        assert beat.failure is not None
        assert (beat.failure.attempt, beat.failure.rank, beat.failure.local_rank) == (attempt, rank, 1)
        assert (beat.failure.exit_code, beat.failure.exception, beat.failure.collateral) == (-9, "", False)
        assert "SIGKILL" in beat.failure.message
        attempt = gang.run()
        resumed = [pod.phase(AgentPhase.RUNNING, attempt).resumed for pod in gang.pods]
        assert all(r is not None and r.attempt == attempt and r.step == 0 for r in resumed)
        figures.append((reported - killed, max(r.first_step_time for r in resumed) - killed))
    assert [pod.process.pid for pod in gang.pods] == agents
    assert victim.termination()["rank"] == rank and victim.termination()["exitCode"] == -9
    with capsys.disabled():
        text = ", ".join(f"{report:.3f}/{step:.3f}" for report, step in figures)
        print(f"\n[seconds from kill -9 of a rank to its report / to the first new step: {text}]")


def test_exception_is_reported_with_its_type_and_message(gang: Gang) -> None:
    attempt = gang.run(FAILS.format(what="raise ValueError('the data is bad\\nreally')"))
    first, second = (failure_of(pod, attempt).failure for pod in gang.pods)
    assert first is not None and second is not None
    assert (first.rank, first.exit_code, first.exception, first.collateral) == (1, 1, "ValueError", False)
    assert first.message == "the data is bad really"
    # The other pod has only the echo, and says so.
    assert second.collateral and second.rank in (2, 3), second
    assert gang.pods[0].termination() | {"step": None} == {
        "attempt": attempt,
        "outcome": "failed",
        "exitCode": 1,
        "rank": 1,
        "exception": "ValueError",
        "message": "the data is bad really",
        "step": None,
    }
    line = "[rank 1] ValueError: the data is bad"
    wait_until(lambda: line in gang.pods[0].text(), "a traceback")
    text = gang.pods[0].text()
    assert "runpy" not in text.split("[rank 1] Traceback")[-1].split("ValueError")[0]


@pytest.mark.parametrize(
    ("what", "code", "exception", "message"),
    [
        ("sys.exit(78)", 78, "SystemExit", "exited with code 78"),
        ("sys.exit(79)", 79, "SystemExit", "exited with code 79"),
        ("sys.exit('no such bucket')", 1, "SystemExit", "no such bucket"),
        ("os._exit(7)", 7, "", "exited with code 7"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -11, "", "killed by signal 11 (SIGSEGV)"),
    ],
)
def test_exit_codes_and_signals_are_kept(
    gang: Gang, what: str, code: int, exception: str, message: str
) -> None:
    attempt = gang.run("import signal\n" + FAILS.format(what=what))
    failure = failure_of(gang.pods[0], attempt).failure
    assert failure is not None
    assert (failure.rank, failure.exit_code, failure.exception, failure.message) == (
        1,
        code,
        exception,
        message,
    )
    assert not failure.collateral


def test_configuration_error_keeps_the_reason_for_the_exit(gang: Gang) -> None:
    what = "\n    try: open('/nonexistent/key')\n    except OSError: sys.exit(78)"
    attempt = gang.run(FAILS.format(what=what))
    failure = failure_of(gang.pods[0], attempt).failure
    assert failure is not None
    assert (failure.exit_code, failure.exception) == (78, "FileNotFoundError")
    assert "/nonexistent/key" in failure.message


@pytest.mark.parametrize(
    ("script", "exception", "message"),
    [
        ("import no_such_module_of_mine\n", "ModuleNotFoundError", "no_such_module_of_mine"),
        ("def broken(:\n    pass\n", "SyntaxError", "train.py, line 1"),
        (None, "FileNotFoundError", "train.py"),
    ],
)
def test_scripts_that_cannot_start(gang: Gang, script: str | None, exception: str, message: str) -> None:
    if script is None:
        gang.script.unlink(missing_ok=True)
    attempt = gang.run(script)
    for pod in gang.pods:
        failure = failure_of(pod, attempt).failure
        assert failure is not None
        assert (failure.exit_code, failure.exception) == (1, exception)
        assert message in failure.message


def test_success_waits_for_all_ranks_and_survives_every_way_to_leave(gang: Gang) -> None:
    # sys.exit(), os._exit(0) and returning: torchelastic alone never ends for the first two when it forked the worker.
    attempt = gang.run(
        "import os, sys, time, atexit, threading\n"
        "import torch.distributed as dist\n"
        "from trainyard.elastic.client import AgentClient\n"
        "dist.init_process_group('gloo')\n"
        "AgentClient.from_env().progress(5, 5)\n"
        "rank = dist.get_rank()\n"
        "atexit.register(print, 'exit handler of', rank)\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread of', rank))).start()\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
        "if rank == 0: sys.exit()\n"
        "if rank == 1: sys.stdout.flush(); os._exit(0)\n"
        "if rank == 2: sys.exit(0)\n"
    )
    for pod in gang.pods:
        beat = pod.phase(AgentPhase.SUCCEEDED, attempt)
        assert beat.progress is not None and beat.progress.step == 5
    for rank, pod in ((0, gang.pods[0]), (2, gang.pods[1]), (3, gang.pods[1])):
        for line in (f"[rank {rank}] thread of {rank}", f"[rank {rank}] exit handler of {rank}"):
            wait_until(lambda pod=pod, line=line: line in pod.text(), line)
    # The store of node 0 lives until the coordinator says that all are done; the agents still beat.
    assert "launcher" in gang.pods[0].processes().values()
    gang.pods[0].wait(lambda b: b.phase == AgentPhase.SUCCEEDED, since=time.time())


def test_worker_is_what_python_would_have_made_of_it(gang: Gang) -> None:
    (gang.shared / "helper_next_to_it.py").write_text("VALUE = 42\n")
    training(
        gang,
        "import json, multiprocessing, os, random, signal, sys, threading\n"
        "import numpy, torch\n"
        "from helper_next_to_it import VALUE\n"
        "facts = dict(\n"
        "  name=__name__, file=__file__, argv=sys.argv, path0=sys.path[0], value=VALUE,\n"
        "  main=sys.modules['__main__'].__file__, process=multiprocessing.current_process().name,\n"
        "  parent=multiprocessing.parent_process() is None, term=signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,\n"
        "  threads=torch.get_num_threads(), omp=os.environ['OMP_NUM_THREADS'], alive=threading.active_count(),\n"
        "  world=os.environ['WORLD_SIZE'], secret='TRAINYARD_TOKEN_FILE' in os.environ,\n"
        "  draws=[random.random(), float(numpy.random.rand())], stdin=sys.stdin.read(),\n"
        "  fds=sorted(os.readlink(f'/proc/self/fd/{n}').split(':')[0] for n in os.listdir('/proc/self/fd')\n"
        "             if os.path.exists(f'/proc/self/fd/{n}')))\n"
        "rank = os.environ['RANK']\n"
        "open(os.environ['TEST_SHARED'] + f'/facts-{rank}.tmp', 'w').write(json.dumps(facts))\n"
        "os.rename(os.environ['TEST_SHARED'] + f'/facts-{rank}.tmp', os.environ['TEST_SHARED'] + f'/facts-{rank}.json')\n"
        + TRAIN,
    )
    facts = [json.loads((gang.shared / f"facts-{rank}.json").read_text()) for rank in range(4)]
    for fact in facts:
        assert fact["name"] == "__main__" and fact["argv"] == [str(gang.script)]
        assert fact["file"] == fact["main"] == str(gang.script)
        assert fact["path0"] == str(gang.shared) and fact["value"] == 42
        assert fact["process"] == "MainProcess" and fact["parent"] and fact["term"]
        assert (fact["threads"], fact["omp"], fact["alive"], fact["world"]) == (1, "1", 1, "4")
        assert not fact["secret"] and fact["stdin"] == ""
        assert fact["fds"].count("pipe") == 2, fact["fds"]  # stdout and stderr
        assert "socket" not in fact["fds"], fact["fds"]  # of the rendezvous store
    assert len({draw for fact in facts for draw in fact["draws"]}) == 8


def test_everything_a_worker_started_is_killed(gang: Gang) -> None:
    stubborn = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "loop = 'import signal, time\\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\\nwhile True: time.sleep(1)'\n"
        "def daemon(env):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "            if env is not None:\n"
        "                os.execve(sys.executable, [sys.executable, '-c', loop, os.environ['TEST_SHARED']], env)\n"
        "            while True: time.sleep(1)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "subprocess.Popen([sys.executable, '-c', loop, os.environ['TEST_SHARED']], start_new_session=True)\n"
        "daemon(None); daemon({}); daemon(dict(os.environ))\n"
    )
    training(gang, stubborn + TRAIN)

    def daemons() -> list[str]:
        rows = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if str(gang.shared) in words and "while True" in words:
                    rows.append(entry.name)
        return rows

    wait_until(lambda: len(daemons()) == 12, "three daemons of each rank")
    kept = {"zygote"}
    assert any(len(pod.processes()) > 5 for pod in gang.pods)
    attempt = gang.hold()
    for pod in gang.pods:
        pod.phase(AgentPhase.IDLE, attempt)
        assert set(pod.processes().values()) == kept, pod.processes()
    assert daemons() == []


def test_newer_attempt_replaces_the_one_that_runs_and_an_older_one_never_does(gang: Gang) -> None:
    first = training(gang)
    before = gang.pods[0].named("rank0")
    second = training(gang)
    assert gang.pods[0].named("rank0") != before
    for pod in gang.pods:
        assert [n for n in pod.processes().values() if n.startswith("rank")] != []
    now = gang.pods[0].named("rank0")
    gang.run(attempt=first)
    stale = time.time()
    gang.attempt = second
    beat = gang.pods[0].wait(lambda b: b.progress is not None, since=stale + 1.0)[1]
    assert (beat.attempt, beat.phase) == (second, AgentPhase.RUNNING)
    assert gang.pods[0].named("rank0") == now


def test_same_directive_again_and_a_late_hold_change_nothing(gang: Gang) -> None:
    attempt = training(gang)
    pid = gang.pods[0].named("rank0")
    for pod in gang.pods:
        gang.coordinator.direct(pod.uid, Directive(action=Action.HOLD, attempt=attempt, reason="late"))
    late = f"{attempt}/hold"
    beat = gang.pods[0].wait(lambda b: b.seen.startswith(late))[1]
    assert (beat.attempt, beat.phase) == (attempt, AgentPhase.RUNNING)
    assert gang.pods[0].named("rank0") == pid


def test_workers_are_forked_from_a_process_with_one_thread(gang: Gang) -> None:
    # With the store's server as a thread of the launcher, one restart in 200 hung on a lock held at the fork.
    training(gang)
    for pod in gang.pods:
        tasks = list(Path(f"/proc/{pod.named('launcher')}/task").iterdir())
        assert len(tasks) == 1, tasks
    assert "store" in gang.pods[0].processes().values()
    assert "store" not in gang.pods[1].processes().values()


def test_taken_port_is_named(gang: Gang) -> None:
    gang.attempt += 1
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", free_port()))  # noqa: S104 - as the store does
        taken.listen()
        gang.coordinator.direct(
            gang.pods[0].uid,
            Directive(
                action=Action.RUN,
                attempt=gang.attempt,
                nodes=1,
                procs_per_node=1,
                master_addr="127.0.0.1",
                master_port=taken.getsockname()[1],
            ),
        )
        failure = failure_of(gang.pods[0], gang.attempt).failure
    assert failure is not None and (failure.rank, failure.exit_code) == (None, None)
    assert "RuntimeError: the rendezvous store cannot listen on port" in failure.message


def test_killed_launcher_takes_its_workers_with_it(gang: Gang) -> None:
    attempt = training(gang)
    victim = gang.pods[1]
    os.kill(victim.named("launcher"), signal.SIGKILL)
    failure = failure_of(victim, attempt).failure
    assert failure is not None and failure.rank is None and failure.exit_code is None
    assert "SIGKILL" in failure.message
    wait_until(lambda: set(victim.processes().values()) == {"zygote"}, "the workers to be gone")


def test_killed_zygote_costs_the_attempt_nothing(gang: Gang) -> None:
    attempt = training(gang)
    pod = gang.pods[0]
    rank, zygote = pod.named("rank0"), pod.named("zygote")
    os.kill(zygote, signal.SIGKILL)
    at = pod.wait(lambda b: not b.ready, since=time.time() - 1)[0]
    beat = pod.wait(lambda b: b.ready, since=at)[1]
    assert (beat.phase, beat.attempt) == (AgentPhase.RUNNING, attempt)
    assert pod.named("rank0") == rank and pod.named("zygote") != zygote
    training(gang)


def test_failure_while_the_coordinator_is_away_is_told_when_it_is_back(gang: Gang) -> None:
    attempt = training(gang)
    gang.coordinator.down()
    try:
        victim = gang.pods[0]
        os.kill(victim.named("rank1"), signal.SIGKILL)
        wait_until(lambda: victim.termination().get("attempt") == attempt, "a message")
        assert victim.termination()["rank"] == 1
    finally:
        gang.coordinator.up()  # the gang is shared with the tests after this one
    failure = failure_of(victim, attempt).failure
    assert failure is not None and (failure.rank, failure.exit_code) == (1, -9)
    training(gang)


def test_twenty_restarts_leak_nothing(gang: Gang) -> None:
    def census(pod: Pod) -> tuple[int, int, list[str]]:
        proc = Path(f"/proc/{pod.process.pid}")
        fds = [str(f.readlink()) for f in (proc / "fd").iterdir() if f.is_symlink()]
        # Connections to the coordinator come and go.
        steady = [fd for fd in fds if not fd.startswith("socket:")]
        return len(steady), len(list((proc / "task").iterdir())), sorted(pod.processes().values())

    script = TRAIN.replace("time.sleep(0.02)", "time.sleep(0.005)")
    training(gang, script)
    before = [census(pod) for pod in gang.pods]
    sockets = [len(list(Path(f"/proc/{pod.process.pid}/fd").iterdir())) for pod in gang.pods]
    for _ in range(20):
        training(gang, script)
    for pod, counts in zip(gang.pods, before, strict=True):
        wait_until(
            lambda pod=pod, counts=counts: census(pod) == counts, f"{counts}, not {census(pod)}", bound=5
        )
    after = [len(list(Path(f"/proc/{pod.process.pid}/fd").iterdir())) for pod in gang.pods]
    assert all(a <= b + 2 for a, b in zip(after, sockets, strict=True))
    zygote = Path(f"/proc/{gang.pods[0].named('zygote')}")
    assert len(list((zygote / "task").iterdir())) == 1
    assert len(list((zygote / "fd").iterdir())) <= 8
    assert len(list((gang.pods[0].folder / "attempts").iterdir())) <= 2
