"""torchelastic's agent with eyes of its own: it says at once which worker ended, and how.

`LocalElasticAgent` (what torchrun runs) sees a dead worker when it polls, then stops its siblings for up to 30 s
before it says anything; it gives times in whole seconds; it never ends when a forked worker leaves through
`sys.exit()` or `os._exit(0)`; and after success it waits 300 s for its peers and then takes the store away from them
(torch 2.15: elastic/multiprocessing/api.py, multiprocessing/spawn.py, elastic/agent/server/api.py). So the one method
that looks after the workers, `_monitor_workers`, is replaced; the rest is torch's.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from trainyard.elastic import notes
from trainyard_agent.rootcause import Death, is_echo

LOOK_SECONDS = 0.1
"""Longest time between two looks at the workers; a death is seen at once, through its pidfd."""
KILLED_SECONDS = 5.0
"""Longest wait for killed siblings; what lasts longer is the agent's to deal with."""
SETTLE_SECONDS = 0.1
"""How long a cause is waited for when only echoes of it were seen."""


class Logs(LogsSpecs):
    """Error files in the attempt's folder; output to the given paths (empty: the worker sees to it itself)."""

    def __init__(self, work_dir: Path, outputs: dict[int, tuple[str, str]]) -> None:
        super().__init__(log_dir=str(work_dir))
        self._work_dir = work_dir
        self._outputs = outputs

    @property
    def root_log_dir(self) -> str:
        return str(self._work_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        errors = {i: str(self._work_dir / f"error-{i}.json") for i in envs}
        for local_rank, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = errors[local_rank]
        return LogsDest(
            stdouts={i: self._outputs[i][0] for i in envs},
            stderrs={i: self._outputs[i][1] for i in envs},
            error_files=errors,
        )


def exit_of(pid: int) -> int | None:
    """How the child `pid` ended (>= 0 code, < 0 minus the signal), None if it lives. Does not reap it."""
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


class RankAgent(LocalElasticAgent):
    """Tells `report` of {"op": "started" | "failed" | "succeeded", ...} as it happens."""

    def __init__(
        self, spec: WorkerSpec, logs: Logs, *, start_method: str, report: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(spec, logs, start_method)
        self._work_dir = Path(logs.root_log_dir)
        self._report = report
        self._pidfds: dict[int, int] = {}
        self._succeeded = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        threads = sum(1 for _ in Path("/proc/self/task").iterdir())
        if threads != 1 and callable(worker_group.spec.entrypoint):
            raise RuntimeError(f"the launcher has {threads} threads, so no worker can be forked safely")
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self._report({"op": "started", "pids": [pids[i] for i in sorted(pids)]})
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._succeeded:
            # Node 0's store, which a slower node may still need, lives as long as this process does: until the agent
            # ends it, when all are done.
            time.sleep(1.0)
            return RunResult(state=WorkerState.HEALTHY)
        pids: dict[int, int] = self._pcontext.pids()  # type: ignore[union-attr]
        self._wait(pids, LOOK_SECONDS)
        exits = {i: exit_of(pid) for i, pid in pids.items()}
        if any(exits.values()):
            return self._failed(worker_group, pids)
        if all(code == 0 for code in exits.values()):
            self._succeeded = True
            self._report({"op": "succeeded"})
        return RunResult(state=WorkerState.HEALTHY)

    def _wait(self, pids: dict[int, int], bound: float) -> None:
        """Until one more worker ended, at most `bound` seconds."""
        waiter = select.poll()
        for pid in pids.values():
            if pid not in self._pidfds:
                try:
                    self._pidfds[pid] = os.pidfd_open(pid)
                except OSError:  # forbidden by a sandbox: look often
                    time.sleep(0.02)
                    return
            if self._pidfds[pid] >= 0 and exit_of(pid) is None:
                waiter.register(self._pidfds[pid], select.POLLIN)
        waiter.poll(bound * 1000)

    def _deaths(self, worker_group: WorkerGroup, pids: dict[int, int]) -> list[Death]:
        """Of workers that ended, and of those that have noted down why they are about to."""
        found = []
        for worker in worker_group.workers:
            code = exit_of(pids[worker.local_rank])
            note = notes.read(notes.path_of(self._work_dir, worker.local_rank))
            if code or (note and code is None):
                found.append(
                    Death(
                        rank=worker.global_rank,
                        local_rank=worker.local_rank,
                        exit_code=code if code or not note else note.exit_code,  # type: ignore[arg-type]
                        time=note.time if note else time.time(),
                        exception=note.exception if note else "",
                        message=note.message if note else "",
                        text=note.text if note else "",
                    )
                )
        return found

    def _failed(self, worker_group: WorkerGroup, pids: dict[int, int]) -> RunResult:
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            deaths = self._deaths(worker_group, pids)
            alive = len(deaths) < len(pids)
            if not alive or not all(map(is_echo, deaths)) or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        self._report({"op": "failed", "deaths": [asdict(d) for d in deaths]})
        for pid in pids.values():  # else torchelastic would ask them with SIGTERM and wait for up to 30 s
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        gone = time.monotonic() + KILLED_SECONDS
        while any(exit_of(pid) is None for pid in pids.values()) and time.monotonic() < gone:
            self._wait(pids, LOOK_SECONDS)
        failures = {
            d.rank: ProcessFailure(
                local_rank=d.local_rank,
                pid=pids[d.local_rank],
                exitcode=d.exit_code,
                error_file=str(self._work_dir / f"error-{d.local_rank}.json"),
            )
            for d in deaths
        }
        return RunResult(state=WorkerState.FAILED, failures=failures)
