"""How much memory a process and its children take at most between two moments, seen from outside.

Proportional set sizes (proc_pid_smaps(5), smaps_rollup): what several processes share is divided among them, so that their
sum is what the machine gives. "anon": nobody else's and shared memory (tmpfs among it), which only ends with its owner.
"file": mapped pages of files, which the kernel takes back when it needs them. Peaks between two looks are missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.main import CHECKOUT

_PAUSE = 0.05
Bytes = dict[str, int]


def of_process(pid: int) -> Bytes:
    """{"anon", "file"}; zeros if it is gone."""
    found = {"anon": 0, "file": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            kind = {"Pss_Anon": "anon", "Pss_Shmem": "anon", "Pss_File": "file"}.get(name)
            if kind:
                found[kind] += int(rest.split()[0]) * 1024
    return found


def children_of(pid: int, but: int = 0) -> list[int]:
    """All descendants, without `but` and its own."""
    found: list[int] = []
    for folder in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, folder.read_text().split()):
                if child != but:
                    found += [child, *children_of(child, but)]
    return found


class Peaks:
    """Of `pid` and of its children together."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._lock = threading.Lock()
        self.begin()

    def begin(self) -> None:
        with self._lock:
            self.before = self._look()
            self.most = {who: dict(found) for who, found in self.before.items()}

    def look(self) -> None:
        with self._lock:
            for who, found in self._look().items():
                for kind, value in found.items():
                    self.most[who][kind] = max(self.most[who][kind], value)

    def _look(self) -> dict[str, Bytes]:
        children = {"anon": 0, "file": 0}
        for child in children_of(self._pid, but=os.getpid()):
            for kind, value in of_process(child).items():
                children[kind] += value
        return {"process": of_process(self._pid), "children": children}


class Watch:
    """A process beside this one that looks at it all the time."""

    def __init__(self) -> None:
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid())], cwd=CHECKOUT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self._say("begin")

    def _say(self, word: str) -> Any:
        assert self._watcher.stdin is not None
        assert self._watcher.stdout is not None
        self._watcher.stdin.write(word + "\n")
        self._watcher.stdin.flush()
        return json.loads(self._watcher.stdout.readline())

    @contextlib.contextmanager
    def during(self) -> Iterator[dict[str, Any]]:
        """Fills the dict with {"before", "most"} when the block ends."""
        found: dict[str, Any] = {}
        self._say("begin")
        yield found
        found.update(self._say("end"))

    def close(self) -> None:
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        self._watcher.wait(10)


def main(pid: int) -> None:
    peaks = Peaks(pid)

    def look() -> None:
        while True:
            peaks.look()
            time.sleep(_PAUSE)

    threading.Thread(target=look, daemon=True).start()
    for line in sys.stdin:
        if line.strip() == "begin":
            peaks.begin()
        else:
            peaks.look()
        print(json.dumps({"before": peaks.before, "most": peaks.most}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
