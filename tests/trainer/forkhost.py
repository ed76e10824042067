"""Ranks as forks of one process that has torch imported: 50 ms each instead of seconds.

Run as a program it is the host: jobs come in as JSON lines, {"id", "argv", "env", "log"}; out go {"id", "pid"} and
{"id", "code"} (negative: the signal); {"quit"} ends it. `Host` is the test's side.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = f"{ROOT / 'operator'}{os.pathsep}{ROOT / 'trainer-image'}"


@dataclass
class Rank:
    """One forked process."""

    pid: int
    log: Path
    code: int | None = None

    @property
    def output(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


@dataclass
class Host:
    """Forks ranks on request and reaps them."""

    folder: Path
    ranks: list[Rank] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": f"{PYTHONPATH}{os.pathsep}{ROOT}",
                "OMP_NUM_THREADS": "1",
                "TMPDIR": str(self.folder),
            },
            bufsize=0,
        )
        self._buffer = b""
        self._read(60)  # imported

    def start(self, argv: list[str], *, world: int = 1, env: dict[str, str] | None = None) -> list[Rank]:
        """The ranks of one gang."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        begun = []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            number = len(self.ranks)
            log = self.folder / f"{number:03d}-rank{rank}.log"
            gang = {k: str(v) for k, v in place.items()} if world > 1 else {}
            job = {"id": number, "argv": argv, "env": {**gang, **(env or {})}, "log": str(log)}
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self.ranks.append(Rank(-1, log))
            begun.append(self.ranks[-1])
            while begun[-1].pid < 0:
                self._hear(10)
        return begun

    def wait(self, ranks: list[Rank], seconds: float = 60) -> list[int]:
        """Exit codes. Kills them all at the bound, and says what they had printed."""
        end = time.monotonic() + seconds
        while any(r.code is None for r in ranks):
            left = end - time.monotonic()
            if left <= 0 or not self._hear(left):
                for rank in ranks:
                    rank.kill()
                said = "\n".join(f"--- {r.log.name} ({r.code})\n{r.output[-3000:]}" for r in ranks)
                raise AssertionError(f"ranks still ran after {seconds} s\n{said}")
        return [r.code for r in ranks if r.code is not None]

    def poll(self, seconds: float) -> None:
        """Hear what has happened, waiting up to `seconds` for something to happen."""
        self._hear(seconds)

    def run(
        self, argv: list[str], *, world: int = 1, env: dict[str, str] | None = None, seconds: float = 60
    ) -> list[Rank]:
        ranks = self.start(argv, world=world, env=env)
        self.wait(ranks, seconds)
        return ranks

    def close(self) -> None:
        assert self._process.stdin is not None
        for rank in self.ranks:
            if rank.code is None:
                rank.kill()
        # Said, not only shown by closing the pipe: a process that a test forked may hold its other end, too.
        self._process.stdin.write(b'{"quit": true}\n')
        self._process.stdin.close()
        self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _hear(self, seconds: float) -> bool:
        message = self._read(seconds)
        if message is None:
            return False
        rank = self.ranks[message["id"]]
        rank.pid = message.get("pid", rank.pid)
        rank.code = message.get("code", rank.code)
        return True

    def _read(self, seconds: float) -> Any:
        end = time.monotonic() + seconds
        stdout = self._process.stdout
        assert stdout is not None
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                return None
            chunk = os.read(stdout.fileno(), 65536)
            if not chunk:
                raise AssertionError("the fork host died")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


def _main() -> None:
    import runpy

    import boto3  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo
    import torch.distributed
    import torch.nn.parallel  # noqa: F401

    import trainyard.trainer.trainer  # noqa: F401

    def say(message: dict[str, Any]) -> None:
        os.write(1, json.dumps(message).encode() + b"\n")

    say({})
    jobs: dict[int, int] = {}
    buffer, open_ = b"", True
    while open_ or jobs:
        if open_ and select.select([0], [], [], 0.01)[0]:
            chunk = os.read(0, 65536)
            open_, buffer = bool(chunk), buffer + chunk
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            job = json.loads(line)
            if "quit" in job:
                open_ = False
                break
            pid = os.fork()
            if pid == 0:
                _child(runpy, job)
            jobs[pid] = job["id"]
            say({"id": job["id"], "pid": pid})
        while jobs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid in jobs:
                say({"id": jobs.pop(pid), "code": os.waitstatus_to_exitcode(status)})
        if not open_:
            time.sleep(0.01)


def _child(runpy: Any, job: dict[str, Any]) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for target in (1, 2):
        os.dup2(log, target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    code = 0
    try:
        runpy.run_path(job["argv"][0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _main()
