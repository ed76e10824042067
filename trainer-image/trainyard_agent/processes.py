"""Which processes belong to an attempt, and how to be sure that none of them lives."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainyard_api.contract import Env

KILL_SECONDS = 10.0
"""Longest wait for killed processes to be gone. Only uninterruptible sleep (state D) lasts longer."""


@dataclass(frozen=True, slots=True)
class Process:
    """One row of /proc."""

    pid: int
    ppid: int
    session: int
    state: str
    """One letter of proc(5): R, S, D, Z, T, ..."""
    name: str


def parse_stat(text: str) -> Process:
    """A row from the text of /proc/PID/stat; the name may hold spaces and parentheses. Raises ValueError."""
    head, _, tail = text.rpartition(")")
    pid, _, name = head.partition("(")
    state, ppid, _group, session, *_ = tail.split()
    return Process(int(pid), int(ppid), int(session), state, name)


def snapshot() -> dict[int, Process]:
    """All processes that are visible now, by PID."""
    rows = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            # Gone between the listing and the read: not a process any more.
            with suppress(OSError, ValueError):
                row = parse_stat(Path(entry.path, "stat").read_text(errors="replace"))
                rows[row.pid] = row
    return rows


def is_marked(environ: bytes, pod_uid: str) -> bool:
    """Whether this content of /proc/PID/environ is that of a worker (any attempt) of this pod."""
    variables = environ.split(b"\0")
    return f"{Env.POD_UID}={pod_uid}".encode() in variables and any(
        v.startswith(f"{Env.ATTEMPT}=".encode()) for v in variables
    )


def _marked(rows: Mapping[int, Process], pod_uid: str) -> set[int]:
    found = set()
    for pid in rows:
        with suppress(OSError):  # gone, or another user's
            if is_marked(Path(f"/proc/{pid}/environ").read_bytes(), pod_uid):
                found.add(pid)
    return found


def belonging(
    rows: Mapping[int, Process],
    *,
    agent: int,
    keep: Collection[int],
    launcher: int | None,
    marked: Collection[int],
) -> set[int]:
    """PIDs of attempts in `rows`: the launcher's session, marked processes, strays, and all below them.

    A stray is a child of the agent that the agent did not start (`keep`): the agent is the reaper of its
    tree, so whatever double-forked out of an attempt ends up there, even with another session and no environment.
    """
    roots = set(marked)
    for row in rows.values():
        in_session = launcher is not None and launcher in (row.pid, row.session)
        if in_session or row.ppid == agent:
            roots.add(row.pid)
    roots -= {agent, *keep}
    children: dict[int, list[int]] = {}
    for row in rows.values():
        children.setdefault(row.ppid, []).append(row.pid)
    found: set[int] = set()
    todo = list(roots)
    while todo:
        pid = todo.pop()
        if pid in rows and pid not in found and pid != agent and pid not in keep:
            found.add(pid)
            todo += children.get(pid, [])
    return found


def kill_all(
    *,
    keep: Collection[int],
    launcher: int | None,
    pod_uid: str,
    reap: Callable[[], None],
    bound: float = KILL_SECONDS,
) -> list[Process]:
    """SIGKILLs every process of an attempt and waits until all are reaped; the survivors at the bound.

    Only processes that live can fork new ones, so it looks again until a look finds none. `reap` must collect
    all dead children of this process.
    """
    deadline = time.monotonic() + bound
    pause = 0.001
    while True:
        reap()
        rows = snapshot()
        victims = belonging(
            rows, agent=os.getpid(), keep=keep, launcher=launcher, marked=_marked(rows, pod_uid)
        )
        if not victims:
            return []
        if time.monotonic() > deadline:
            return [rows[pid] for pid in sorted(victims)]
        for pid in victims:
            if rows[pid].state != "Z":
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
