"""Where the nodes of an attempt meet: a store in a process of its own on node 0, and clients of it everywhere.

torchelastic's static rendezvous keeps the store's server in the launcher, as a thread. Workers are forked from the
launcher, and a fork while that thread holds a lock leaves the lock held for ever in the worker (seen here: about one
restart in 200 hung in TCPStore's constructor, torch 2.15). A process with one thread can be forked safely.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from trainyard.elastic.network import wait_for_listener
from trainyard_agent.launchrequest import LaunchRequest
from trainyard_agent.prctl import die_with_parent, set_name

MEETING_SECONDS = 300
"""Longest wait of the nodes for each other. All were told to run at the same time, and were ready."""
STORE_SECONDS = 30.0
"""Longest time that the store may take to listen."""


def fork_store(request: LaunchRequest, fds: Sequence[int]) -> int:
    """PID of a child that serves the store of `request` until this process ends. It closes `fds`.

    Raises RuntimeError with its reason when it cannot listen (the port is taken).
    """
    launcher = os.getpid()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _be_store(request, launcher, fds, write_end)
    os.close(write_end)
    waiter = select.poll()
    waiter.register(read_end, select.POLLIN)
    said = os.read(read_end, 4096).decode(errors="replace") if waiter.poll(STORE_SECONDS * 1000) else ""
    os.close(read_end)
    if said != "ok":
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        why = said or f"no sign of it within {STORE_SECONDS:.0f} s"
        raise RuntimeError(f"the rendezvous store cannot listen on port {request.master_port}: {why}")
    return pid


def _be_store(request: LaunchRequest, launcher: int, fds: Sequence[int], answer: int) -> NoReturn:
    try:
        die_with_parent(launcher)
        set_name("store")
        for fd in fds:
            os.close(fd)
        store = TCPStore(
            request.master_addr,
            request.master_port,
            is_master=True,
            timeout=timedelta(seconds=STORE_SECONDS),
            wait_for_workers=False,
        )
        os.write(answer, b"ok")
        os.close(answer)
        while store is not None:
            signal.pause()
    except BaseException as error:
        with suppress(OSError):
            os.write(answer, str(error).encode()[:1024])
    finally:
        os._exit(1)


class Meeting(StaticTCPRendezvous):
    """Static rendezvous in which every node is a client, and nobody goes on before all are there."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Raises TimeoutError that says how many of the nodes came."""
        begun = time.monotonic()
        wait_for_listener(self.master_addr, self.master_port, MEETING_SECONDS)
        self._store = TCPStore(
            self.master_addr, self.master_port, is_master=False, timeout=self.timeout, wait_for_workers=False
        )
        store = PrefixStore(self.run_id, self._store)
        if store.add("trainyard/arrived", 1) == self.world_size:
            store.set("trainyard/complete", "yes")
        left = max(MEETING_SECONDS - (time.monotonic() - begun), 1.0)
        try:
            store.wait(["trainyard/complete"], timedelta(seconds=left))
        except RuntimeError as error:  # torch's DistStoreError
            came = store.add("trainyard/arrived", 0)
            raise TimeoutError(
                f"{came} of {self.world_size} nodes came within {MEETING_SECONDS} s: {error}"
            ) from None
        here = RendezvousStoreInfo(self.master_addr, self.master_port)
        return RendezvousInfo(store, self.rank, self.world_size, here)
