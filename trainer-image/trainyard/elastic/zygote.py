"""A process with torch imported, from which launchers are forked in milliseconds.

Forking is safe only while this process has one thread and no CUDA context; both are checked before each fork, and if
one does not hold, the agent is told and starts fresh processes instead.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import pkgutil
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from trainyard.checkpoint import stores
from trainyard.elastic import launcher, worker
from trainyard_agent.launchrequest import LaunchRequest, receive_request
from trainyard_agent.prctl import die_with_parent, set_name
from trainyard_agent.settings import SettingsError, parse_command
from trainyard_api.contract import Env

ALWAYS = (
    "torch",
    "torch.distributed",
    "torch.distributed.run",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "trainyard.elastic.meeting",
    "torch.nn.parallel",
    "torch.optim",
    # The first optimizer that is made imports this (torch._compile): 900 modules, seconds of CPU in each rank of each
    # attempt. It was most of the time from a failure to the first new step.
    "torch._dynamo",
    "trainyard.elastic.ranks",
)
IF_THERE = ("numpy", "boto3")
NOT_FOR_RANKS = (
    "trainyard.__main__",
    "trainyard.export.__main__",
    "trainyard.cli",
    "trainyard.demos",
    "trainyard.pytorch",
)
ADOPTION_SECONDS = 5.0
"""Longest wait of a launcher to become the agent's child."""


def import_all(preload: list[str], folder: str) -> list[str]:
    """Imports what workers will need; one line for each of `preload` (and of our library) that cannot be.

    `folder` is where the user's own modules are. Raises ImportError if torch is not there.
    """
    for name in ALWAYS:
        importlib.import_module(name)
    problems = []
    for name in IF_THERE:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    sys.path.insert(0, folder)
    try:
        for name in (*_library(problems), *preload):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                # A part of the library for a package that this image does not have: whoever wants the part is told then.
                ours = name.startswith("trainyard.") and not (error.name or "").startswith("trainyard")
                if not ours:
                    problems.append(f"cannot preload {name}: {type(error).__name__}: {error}")
            except Exception as error:  # a user's module may raise anything
                problems.append(f"cannot preload {name}: {type(error).__name__}: {error}")
    finally:
        sys.path.remove(folder)
    try:
        stores.warm_up()
    except Exception as error:  # the workers will meet it again, and say more
        problems.append(f"cannot prepare the checkpoint store: {type(error).__name__}: {error}")
    return problems


def _library(problems: list[str]) -> list[str]:
    """The modules of the training library that a fit may want: it imports its parts when they are asked for, which is too
    late here."""
    package = importlib.import_module("trainyard")
    names = []
    try:
        for module in pkgutil.walk_packages(package.__path__, "trainyard."):
            if not module.name.startswith(NOT_FOR_RANKS):
                names.append(module.name)
    except Exception as error:
        problems.append(f"cannot preload trainyard: {type(error).__name__}: {error}")
    return names


def why_not_fork() -> str:
    """Why a fork would not be safe now; empty if it would."""
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    if threads != 1:
        return f"it has {threads} threads (a preloaded module started them)"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "it has a CUDA context (a preloaded module made it)"
    return ""


def fork_launcher(request: LaunchRequest, fds: list[int], channel: socket.socket) -> int:
    """PID of a new launcher. It is the agent's child, not ours: forked twice, it is an orphan, and the agent the reaper.

    So it outlives this process, and its end is seen by the agent.
    """
    read_end, write_end = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            pid = os.fork()
            if pid == 0:
                os.close(read_end)
                os.close(write_end)
                channel.close()
                _be_launcher(request, fds)
            os.write(write_end, str(pid).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(middle, 0)
    with os.fdopen(read_end) as answer:
        return int(answer.read())


def _be_launcher(request: LaunchRequest, fds: list[int]) -> NoReturn:
    try:
        os.setsid()
        deadline = time.monotonic() + ADOPTION_SECONDS
        while os.getppid() != request.agent_pid:  # the process in the middle is about to end
            if time.monotonic() > deadline:
                launcher.reporter(fds[0])(
                    {
                        "op": "error",
                        "exception": "RuntimeError",
                        "message": "the agent did not adopt the launcher",
                    }
                )
                os._exit(1)
            time.sleep(0.001)
        die_with_parent(request.agent_pid)
        launcher.run(request, fds)
    finally:
        os._exit(1)


def serve(channel: socket.socket) -> None:
    """Answers launch requests until the agent closes the channel."""

    def say(**message: Any) -> None:
        channel.sendall(json.dumps(message).encode() + b"\n")

    while (received := receive_request(channel)) is not None:
        request, fds = received
        why = why_not_fork()
        if why:
            say(op="refused", message=why)
        else:
            say(op="launched", pid=fork_launcher(request, fds, channel))
        for fd in fds:
            os.close(fd)


def main() -> None:
    set_name("zygote")
    with socket.socket(fileno=3) as channel:
        preload = [m.strip() for m in os.environ.get(Env.PRELOAD, "").split(",") if m.strip()]
        try:
            folder = worker.path0(parse_command(os.environ.get(Env.COMMAND, "")))
        except SettingsError:
            folder = str(Path.cwd())
        for problem in import_all(preload, folder):
            channel.sendall(json.dumps({"op": "warning", "message": problem}).encode() + b"\n")
        gc.collect()
        gc.freeze()  # so that a collection in a worker does not copy these pages
        channel.sendall(b'{"op": "ready"}\n')
        serve(channel)


if __name__ == "__main__":
    main()
