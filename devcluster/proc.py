"""Processes that outlive the program which starts them, and that are only ever signalled if they are still the same.

A process is known by its pid and its start time. Both are written by the process itself, before it becomes the program
that is wanted, so that there is no moment at which a killed starter leaves a process behind which nobody knows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

# Becomes the program in $@ after noting pid and start time, and entering the cgroup named first (or "-").
_LAUNCH = """
set -e
[ "$1" = - ] || echo $$ > "$1"
read -r stat < /proc/$$/stat
echo "$stat $3" > "$2.new"
mv "$2.new" "$2"
shift 3
exec "$@"
"""
# In the environment of processes whose parent looks after them: nobody else should.
GUARDED = "TRAINYARD_DIES_WITH_PARENT"
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This program's environment without proxies, which must not come between the parts of a cluster."""
    kept = {key: value for key, value in os.environ.items() if key.lower() not in _PROXIES}
    # A sudo without -i may lack the folders of nft and the like.
    path = f"{kept.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
    return kept | {"PATH": path} | dict(extra or {})


def start_time(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: together with its pid this names it until the next boot."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie is dead for every purpose here; in ControlPlane it may be ours to reap.
    return None if fields[0] in "ZX" else fields[19]


class Process:
    """A named background process, with its pid in a file and its output in a log."""

    def __init__(self, name: str, pids: Path, log: Path) -> None:
        self.name = name
        self.record = pids / name
        self.log = log

    @property
    def pid(self) -> int | None:
        """Its pid if it runs."""
        try:
            stat = self.record.read_text()
        except OSError:
            return None
        head, _, rest = stat.rpartition(")")
        pid = int(head.split()[0])
        return pid if start_time(pid) == rest.split()[19] else None

    @property
    def running(self) -> bool:
        return self.pid is not None

    def runs_as(self, argv: Iterable[object]) -> bool:
        """Whether it runs, and was started with just these arguments."""
        return self.running and self.record.read_text().split()[-1] == _digest(argv)

    def start(
        self,
        argv: Iterable[object],
        *,
        cgroup: Path | None = None,
        env: Mapping[str, str] | None = None,
        dies_with_parent: bool = False,
    ) -> None:
        """Start it in a session of its own, out of reach of the terminal's Ctrl-C."""
        command = [str(argument) for argument in argv]
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.record.unlink(missing_ok=True)
        extra = dict(env or {}) | ({GUARDED: "1"} if dies_with_parent else {})
        # setpriv: a preexec_fn would do as well, were it not unsafe as soon as the starter has threads.
        guard = ["setpriv", "--pdeathsig", "KILL"] if dies_with_parent else []
        procs = str(cgroup / "cgroup.procs") if cgroup else "-"
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                [
                    *guard,
                    "/bin/sh",
                    "-c",
                    _LAUNCH,
                    "launch",
                    procs,
                    str(self.record),
                    _digest(command),
                    *command,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(extra),
                start_new_session=True,
                cwd="/",
            )
        _children.append(child)
        while not self.record.exists() and child.poll() is None:
            time.sleep(0.002)

    def stop(self, *, seconds: float = 5, how: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, and make it end when it does not; forget it."""
        stop_all([self], seconds=seconds, how=how)

    def signal(self, how: signal.Signals) -> None:
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)


# Children of this very program, kept so that they are reaped when they end.
_children: list[subprocess.Popen[bytes]] = []


def reap() -> None:
    """Collect those of our children that have ended."""
    _children[:] = [child for child in _children if child.poll() is None]


def stop_all(
    processes: Iterable[Process], *, seconds: float = 5, how: signal.Signals = signal.SIGTERM
) -> None:
    """Stop several at once: they end in parallel."""
    left = list(processes)
    records = [process.record for process in left]
    for process in left:
        process.signal(how)
    deadline = time.monotonic() + seconds
    while left := [process for process in left if process.running]:
        if time.monotonic() > deadline:
            for process in left:
                process.signal(signal.SIGKILL)
            deadline = time.monotonic() + 5
        time.sleep(0.01)
        reap()
    reap()
    for record in records:
        record.unlink(missing_ok=True)


def _digest(argv: Iterable[object]) -> str:
    return hashlib.sha256("\0".join(str(argument) for argument in argv).encode()).hexdigest()[:16]


def run(
    *argv: object, check: bool = True, seconds: float = 60, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a short command to its end; an error holds its output."""
    command = [str(argument) for argument in argv]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        input=text,
        stdin=None if text is not None else subprocess.DEVNULL,
        env=environment(),
        timeout=seconds,
        check=False,
    )
    if check and result.returncode != 0:
        raise CommandError(command, result)
    return result


class CommandError(RuntimeError):
    """A command that failed, with what it said."""

    def __init__(self, command: list[str], result: subprocess.CompletedProcess[str]) -> None:
        self.result = result
        said = (result.stderr or result.stdout).strip()[-2000:]
        super().__init__(f"{' '.join(command)} exited with {result.returncode}: {said}")
