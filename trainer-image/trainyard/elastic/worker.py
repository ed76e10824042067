"""One rank: makes the process what `python script.py` would have found, runs the user's program, and ends.

A forked worker has the zygote's memory (torch imported) and the launcher's habits (signal handlers, descriptors);
all of that is undone here. `python -m trainyard.elastic.worker` is the same without a zygote.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing.process
import os
import runpy
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from trainyard.elastic import notes, threads
from trainyard_agent.prctl import die_with_parent, set_name
from trainyard_agent.settings import parse_command
from trainyard_api.contract import Env

LAUNCHER_PID = "TRAINYARD_LAUNCHER_PID"
WORK_DIR = "TRAINYARD_WORK_DIR"
_MAIN_PROCESS = multiprocessing.current_process()
TEARDOWN_SECONDS = 5.0
"""Longest time that a worker which failed may take to end (threads that do not stop, exit handlers that hang)."""


def path0(command: Sequence[str]) -> str:
    """What Python puts in front of sys.path for this command line: the script's folder, or the working directory."""
    return str(Path.cwd()) if command[0] == "-m" else str(Path(command[0]).resolve().parent)


def execute(command: Sequence[str]) -> None:
    """Runs the program as `__main__`. Raises what it raises."""
    sys.path.insert(0, path0(command))
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


def run_and_exit(command: Sequence[str], work_dir: Path) -> NoReturn:
    """Runs the program, notes down how it ended, and ends the process with the exit code that Python would give."""
    from torch.distributed.elastic.multiprocessing.errors import record

    code = 0
    try:
        record(execute)(command)
    except BaseException as error:  # whatever it is, it is how this rank ended
        code = notes.exit_code_of(error)
        if code:
            with suppress(OSError):
                notes.write(notes.note_of(error), notes.path_of(work_dir, int(os.environ["LOCAL_RANK"])))
            timer = threading.Timer(TEARDOWN_SECONDS, os._exit, [code])
            timer.daemon = True
            timer.start()
        _print(error)
    _tear_down()
    os._exit(code)


def _print(error: BaseException) -> None:
    if isinstance(error, SystemExit):
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    else:
        error.__traceback__ = _from_user(error.__traceback__)
        # The log has the rank in front of each line already; torch's hook (distributed_c10d) would add it again.
        torchs = getattr(sys.excepthook, "__module__", "").startswith("torch.")
        hook = sys.__excepthook__ if torchs else sys.excepthook
        hook(type(error), error, error.__traceback__)


def _from_user(traceback: TracebackType | None) -> TracebackType | None:
    """Without the frames above the user's program; all of them if there is nothing else."""
    ours = (__file__, "<frozen runpy>", runpy.__file__)
    rest = traceback
    while rest is not None:
        name = rest.tb_frame.f_code.co_filename
        if name not in ours and not name.endswith("elastic/multiprocessing/errors/__init__.py"):
            return rest
        rest = rest.tb_next
    return traceback


def _tear_down() -> None:
    """What the interpreter does at its end, in its order; a forked process would skip the exit handlers."""
    for step in (getattr(threading, "_shutdown", None), getattr(atexit, "_run_exitfuncs", None)):
        if step is not None:
            try:
                step()
            except BaseException as error:  # as the interpreter: print it and go on
                sys.excepthook(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    ctypes.CDLL(None).fflush(None)


def _common(launcher: int, rank: str) -> None:
    die_with_parent(launcher)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for stream in (sys.stdout, sys.stderr):
        # As PYTHONUNBUFFERED, but in whole lines: the log has no use for parts of them.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    set_name(f"rank{rank}")


def open_fds() -> set[int]:
    """Descriptors of this process."""
    found = set()
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        with suppress(OSError):  # the one that the listing itself took
            os.fstat(fd)
            found.add(fd)
    return found


def forked(launcher: int, work_dir: Path, fds: Sequence[int], kept: set[int]) -> NoReturn:
    """Body of a worker that torchelastic forked.

    `fds`: the launcher's report pipe, then stdout and stderr of each local rank. `kept`: what the zygote had open
    (a preloaded module may want it); what the launcher opened since, such as the store's sockets, is closed.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    _common(launcher, os.environ["RANK"])
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in zip((null, *fds[1 + 2 * local_rank :][:2]), (0, 1, 2), strict=True):
        os.dup2(source, target)
    for fd in open_fds() - kept - {0, 1, 2}:
        os.close(fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing had put another one there
    for name in (LAUNCHER_PID, WORK_DIR):
        del os.environ[name]
    _be_main_process()
    threads.apply(os.environ)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()  # else every rank of every attempt would have the zygote's
    run_and_exit(parse_command(os.environ[Env.COMMAND]), work_dir)


def _be_main_process() -> None:
    """Not a child of the multiprocessing module: its name and parent are what a program may look at."""
    process = multiprocessing.process
    process._current_process = _MAIN_PROCESS  # type: ignore[attr-defined]
    process._parent_process = None  # type: ignore[attr-defined]


def main() -> NoReturn:
    """Body of a worker that torchelastic started as a fresh process."""
    _common(int(os.environ.pop(LAUNCHER_PID)), os.environ["RANK"])
    sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123 - lives as long as the process
    run_and_exit(parse_command(os.environ[Env.COMMAND]), Path(os.environ.pop(WORK_DIR)))


if __name__ == "__main__":
    main()
