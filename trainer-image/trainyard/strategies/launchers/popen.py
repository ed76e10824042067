"""The other ranks of this node as children that run this program's command line again."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainyard.environment import Place
from trainyard.errors import MisconfigurationException
from trainyard.failure import ending
from trainyard.failure.cause import Cause
from trainyard.failure.errors import SIGTERM_CODE, PeerFailed
from trainyard.failure.watch import CHANCE_SECONDS, child_failed
from trainyard.strategies.launchers.command import own_command
from trainyard_agent.prctl import die_with_parent

PARENT_ENV = "TRAINYARD_LAUNCHED_BY"
_LONGEST_WAIT = 600.0
"""At the end of the program for the others to come to theirs."""
_FAILED_WAIT = 5.0
_STORE_TIMEOUT = 60.0


@dataclass
class Gang:
    """The ranks of this node, of which this process is the first."""

    place: Place
    folder: tempfile.TemporaryDirectory[str]
    store: Any
    """Keeps the rendezvous alive on the first node."""
    children: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    """By local rank."""
    inside: int = 0
    """Entry points that this process is in."""
    failed: Cause | None = None
    given_up: bool = False
    """An exception has come out of an entry point: the others are about to end, or hang."""

    def start_children(self, command: list[str]) -> None:
        base = dict(os.environ)
        if threading.current_thread() is threading.main_thread():
            base[PARENT_ENV] = str(os.getpid())  # else they would end with this thread: see die_with_parent
        for local in range(1, self.place.local_world_size):
            env = {**base, **_variables(self.place, local, self.folder.name)}
            self.children[local] = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL)
        threading.Thread(target=self._look_after, name="children", daemon=True).start()
        atexit.register(self.finish)

    def _look_after(self) -> None:
        """In a thread: until the last child has ended."""
        waiter = select.poll()
        fds = {os.pidfd_open(child.pid): local for local, child in self.children.items()}
        for fd in fds:
            waiter.register(fd, select.POLLIN)
        while fds:
            for fd, _ in waiter.poll():
                waiter.unregister(fd)
                local = fds.pop(fd)
                os.close(fd)
                self._ended(local, self.children[local].wait())

    def _ended(self, local: int, code: int) -> None:
        if code == 0 or self.failed is not None or self.given_up:
            return
        cause = self._cause(local, code)
        if code == SIGTERM_CODE and child_failed(None):
            return  # they all stop together
        self.failed = cause
        if not self.inside or child_failed(cause):
            return
        # Not connected yet, and it never will be: the other side of the rendezvous is missing.
        time.sleep(CHANCE_SECONDS)
        self.kill()
        ending.end_process(cause.code, f"{cause}; rank {self.place.rank} ends because of it")

    def _cause(self, local: int, code: int) -> Cause:
        rank = self.place.rank + local
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads(_error_file(self.folder.name, local).read_text())["message"]
            return Cause(rank, "", said["message"], said["extraInfo"]["py_callstack"])
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return Cause(rank, "", f"its process {how}; what it said is above", code=code if code > 0 else 1)

    def kill(self) -> None:
        for child in self.children.values():
            child.kill()

    def finish(self) -> None:
        """At the end of the program: nobody is left behind, and a failure is not kept quiet."""
        ended_badly = self.given_up or getattr(sys, "last_value", None) is not None
        end = time.monotonic() + (_FAILED_WAIT if ended_badly or self.failed else _LONGEST_WAIT)
        for local, child in self.children.items():
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                ending.say(f"rank {self.place.rank + local} did not end with the program; it is killed")
                child.kill()
                child.wait()
        failed = [
            self._cause(local, child.returncode) for local, child in self.children.items() if child.returncode
        ]
        self.folder.cleanup()
        if failed and not ended_badly:
            ending.end_process(failed[0].code, f"{failed[0]}")


_gangs: list[Gang] = []
"""One at most."""


def start(place: Place) -> Gang:
    """The gang of this process; its children are started by the first call. Raises MisconfigurationException."""
    if _gangs:
        return _gangs[0]
    command = own_command()
    folder = tempfile.TemporaryDirectory(prefix="trainyard-ranks-")
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store, port = None, os.environ.get("MASTER_PORT", "")
    if place.node_rank == 0:
        store, port = _serve_store(address, port)
    elif not port:
        raise MisconfigurationException("MASTER_PORT: set the same one on all nodes")
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)
    # All ranks are clients of the store: no port has to be chosen before somebody listens on it.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    _share_cores(place.local_world_size)
    gang = Gang(replace(place, launched=True, start=None), folder, store)
    gang.start_children(command)
    os.environ.update(_variables(gang.place, 0, folder.name))
    _gangs.append(gang)
    return gang


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Around an entry point. Raises PeerFailed if a child failed since the last one."""
    gang = _gangs[0] if _gangs else None
    if gang is None:
        yield
        return
    if gang.failed is not None and not gang.inside:
        gang.given_up = True
        raise PeerFailed(str(gang.failed))
    gang.inside += 1
    try:
        yield
    except BaseException:
        gang.given_up = True
        raise
    finally:
        gang.inside -= 1


def adopt(env: Mapping[str, str]) -> None:
    """In a child of `start`: end with the parent."""
    if env is os.environ and (parent := os.environ.pop(PARENT_ENV, "")):
        die_with_parent(int(parent))


def _variables(place: Place, local: int, folder: str) -> dict[str, str]:
    return {
        "RANK": str(place.rank + local), "LOCAL_RANK": str(local), "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.local_world_size), "GROUP_RANK": str(place.node_rank),
        "NODE_RANK": str(place.node_rank), "TORCHELASTIC_ERROR_FILE": str(_error_file(folder, local)),
    }  # fmt: skip


def _error_file(folder: str, local: int) -> Path:
    return Path(folder) / f"error-{local}.json"


def _serve_store(address: str, port: str) -> tuple[Any, str]:
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=_STORE_TIMEOUT)
    try:
        store = TCPStore(address, int(port or 0), is_master=True, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise MisconfigurationException(
            f"MASTER_PORT: cannot listen on {address}:{port} ({str(error).splitlines()[0]}); leave it out to have a free one"
        ) from None
    return store, str(store.port)


def _share_cores(processes: int) -> None:
    """As torchrun does, but for as many threads as there are cores for."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
