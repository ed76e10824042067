"""Progress lines on stderr: what is being waited for, why, and for how long it took."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from devcluster.errors import DevclusterError

_START = time.monotonic()


def say(text: str) -> None:
    """Print one line with the seconds since this program began."""
    print(f"[{time.monotonic() - _START:6.1f}s] {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Announce a piece of work and, when it took long enough to be noticed, say that it is over."""
    say(f"{what} ...")
    begin = time.monotonic()
    yield
    seconds = time.monotonic() - begin
    if seconds >= 1:
        say(f"{what}: done in {seconds:.1f} s")


def tail(log: Path | None, lines: int = 15) -> str:
    """The last lines of a log, indented, for an error message."""
    if log is None or not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace").splitlines()[-lines:]
    return f"\nlast lines of {log}:\n" + "\n".join(f"    {line[:400]}" for line in text)


def wait_for(
    what: str,
    ready: Callable[[], bool],
    *,
    seconds: float,
    alive: Callable[[], bool] = lambda: True,
    log: Path | None = None,
    every: float = 0.1,
) -> None:
    """Poll until ready; at the bound, or when what is waited for has died, say so and show its log."""
    begin = time.monotonic()
    while not ready():
        waited = time.monotonic() - begin
        if not alive():
            raise DevclusterError(f"{what}: the process died after {waited:.1f} s{tail(log)}")
        if waited > seconds:
            raise DevclusterError(f"{what}: not so after {waited:.0f} s, giving up{tail(log)}")
        time.sleep(every)
