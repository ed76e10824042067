"""One attempt on one node: static rendezvous, then torchelastic's agent with the workers under it.

What torchrun does for `--rdzv-backend=static --max-restarts=0`, with three waits taken out: no name is resolved,
no node retries slowly because node 0 was later, and ranks follow from the node's rank without a round over the store.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from trainyard.elastic import worker
from trainyard.elastic.network import interface_of
from trainyard.elastic.threads import default_omp
from trainyard_agent.launchrequest import LaunchRequest, receive_request
from trainyard_agent.log import one_line
from trainyard_agent.prctl import set_name

_INTERRUPTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


def reporter(fd: int) -> Callable[[dict[str, Any]], None]:
    """A function that writes one JSON line to the agent's pipe. An agent that is gone is no error: so are we, soon."""

    def report(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            while data:
                data = data[os.write(fd, data) :]
        except OSError:
            return

    return report


def prepare_environment(request: LaunchRequest) -> None:
    """The environment of this process and of the workers becomes the one of the request."""
    env = dict(request.env)
    env["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"  # rank = node rank * processes + local rank
    default_omp(env, request.procs_per_node)
    if "GLOO_SOCKET_IFNAME" not in env and (name := interface_of(request.local_addr)):
        env["GLOO_SOCKET_IFNAME"] = name  # else gloo resolves the host's name
    env[worker.WORK_DIR] = request.work_dir
    env[worker.LAUNCHER_PID] = str(os.getpid())
    os.environ.clear()
    os.environ.update(env)


def run(request: LaunchRequest, fds: list[int]) -> NoReturn:
    """Runs the attempt to its end and ends the process. The agent hears of everything through `fds[0]`."""
    report = reporter(fds[0])
    try:
        _run(request, fds, report)
    except BaseException as error:  # the agent must hear of it, whatever it is
        report({"op": "error", "exception": type(error).__name__, "message": one_line(error)})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _run(request: LaunchRequest, fds: list[int], report: Callable[[dict[str, Any]], None]) -> None:
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    set_name("launcher")
    prepare_environment(request)

    from torch.distributed.elastic.agent.server.api import WorkerSpec

    from trainyard.elastic.meeting import MEETING_SECONDS, Meeting, fork_store
    from trainyard.elastic.ranks import Logs, RankAgent

    socket.getfqdn = lambda name="": (
        name or socket.gethostname()
    )  # torchelastic's events ask for it; never a resolver
    if request.node_rank == 0:
        fork_store(request, fds)
    work_dir, launcher = Path(request.work_dir), os.getpid()
    kept = worker.open_fds() - set(fds)
    local_ranks = range(request.procs_per_node)

    def forked_worker() -> NoReturn:
        worker.forked(launcher, work_dir, fds, kept)

    def output(local_rank: int, stream: int) -> str:
        return "" if request.fork else f"/dev/fd/{fds[1 + 2 * local_rank + stream]}"

    spec = WorkerSpec(
        role="trainyard",
        local_world_size=request.procs_per_node,
        entrypoint=forked_worker if request.fork else sys.executable,
        args=() if request.fork else ("-P", "-m", "trainyard.elastic.worker"),
        rdzv_handler=Meeting(
            request.master_addr,
            request.master_port,
            request.node_rank,
            request.nodes,
            request.run_id,
            MEETING_SECONDS,
        ),
        max_restarts=0,
        monitor_interval=0.001,  # RankAgent does the waiting
        master_addr=request.master_addr,
        master_port=request.master_port,
        local_addr=request.local_addr,
    )
    logs = Logs(work_dir, {i: (output(i, 0), output(i, 1)) for i in local_ranks})
    RankAgent(spec, logs, start_method="fork", report=report).run()


def main() -> NoReturn:
    """A launcher without a zygote: takes one request from descriptor 3."""
    os.setsid()
    with socket.socket(fileno=3) as channel:
        received = receive_request(channel)
    if received is None:
        sys.exit("the agent closed the channel before it sent a request")
    run(*received)


if __name__ == "__main__":
    main()
