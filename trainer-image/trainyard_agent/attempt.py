"""One attempt on this node, as the agent sees it: a launcher, its report pipe, and how it ended."""

from __future__ import annotations

import os
import selectors
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainyard_agent.launchrequest import LaunchRequest
from trainyard_agent.lines import Closed, LineReader
from trainyard_agent.log import one_line, say
from trainyard_agent.logpump import LogPump
from trainyard_agent.rootcause import Death, root_cause, signal_name
from trainyard_agent.zygote import Channel, NotThere, NotUsable, Zygote
from trainyard_api.protocol import Directive, Failure


class Attempt:
    """`started(pids)`, `failed(Failure)` and `succeeded()` are called from `read` and `exited`; of the last two
    one, once."""

    def __init__(
        self,
        directive: Directive,
        selector: selectors.BaseSelector,
        *,
        started: Callable[[list[int]], None],
        failed: Callable[[Failure], None],
        succeeded: Callable[[], None],
    ) -> None:
        self.directive = directive
        self.number = directive.attempt
        self.launcher: int | None = None
        self._selector = selector
        self._started, self._failed, self._succeeded = started, failed, succeeded
        self._report: int | None = None
        self._reader: LineReader | None = None
        self._over = False

    def launch(self, request: LaunchRequest, zygote: Zygote, pump: LogPump) -> None:
        """Starts the launcher: forked by the zygote if there is one, else a fresh process.

        Raises OSError and LaunchFailed; what was started by then is the next sweep's.
        """
        fds = self._pipes(pump)
        try:
            if zygote.usable:
                try:
                    self.launcher = zygote.launch(request, fds)
                    return
                except NotThere:
                    say(f"attempt {self.number}: the zygote is gone, starting from a fresh process")
                except NotUsable as error:
                    zygote.give_up(str(error))
            fresh = Channel("trainyard.elastic.launcher", request.env)
            self.launcher = fresh.pid
            try:
                fresh.send(replace(request, fork=False), fds)
            finally:
                fresh.close()
        finally:
            for fd in fds:
                os.close(fd)

    def _pipes(self, pump: LogPump) -> list[int]:
        """The descriptors that travel with the request. Raises OSError when there are none left."""
        self._report, write_end = os.pipe()
        os.set_blocking(self._report, False)
        self._reader = LineReader(self._report)
        self._selector.register(self._report, selectors.EVENT_READ, self.read)
        fds = [write_end]
        first = self.directive.node_rank * self.directive.procs_per_node
        for local_rank in range(self.directive.procs_per_node):
            for target in (1, 2):
                read_end, write_end = os.pipe()
                pump.add(read_end, first + local_rank, target)
                fds.append(write_end)
        return fds

    def read(self) -> None:
        """Takes what the launcher said; at its end, nothing is left to hear."""
        while self._reader is not None:
            try:
                messages = self._reader.read()
            except Closed:
                self._stop_reading()
                return
            if not messages:
                return
            for message in messages:
                self._hear(message)

    def exited(self, status: int) -> None:
        """The launcher was reaped with this status (as of `os.waitstatus_to_exitcode`)."""
        self.read()
        end = f"signal {-status} ({signal_name(-status)})" if status < 0 else f"code {status}"
        self.fail(f"the launcher ended with {end} before it said how its workers ended")

    def fail(self, message: str) -> None:
        """The launcher itself failed; no rank is the cause. Nothing happens if the end is known already."""
        if not self._over:
            self._over = True
            self._failed(Failure(attempt=self.number, message=one_line(message), time=time.time()))

    def close(self) -> None:
        """Stops listening: whatever comes now is of no interest."""
        self._over = True
        self._stop_reading()

    def _stop_reading(self) -> None:
        if self._report is not None:
            self._selector.unregister(self._report)
            os.close(self._report)
        self._report = self._reader = None

    def _hear(self, message: dict[str, Any]) -> None:
        op = message.get("op")
        if self._over:
            return
        if op == "started":
            self._started([int(pid) for pid in message.get("pids", [])])
        elif op == "failed":
            deaths = [Death.from_json(d) for d in message["deaths"]]
            self._over = True
            self._failed(root_cause(self.number, deaths))
        elif op == "succeeded":
            self._over = True
            self._succeeded()
        elif op == "error":
            self.fail(f"{message.get('exception', 'error')}: {message.get('message', '')}")


def work_dir(runtime: Path, attempt: int) -> Path:
    """An empty folder for the error files of `attempt`; those of attempts before the last one go. Raises OSError."""
    parent = runtime / "attempts"
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.iterdir():
        if not old.name.isdigit() or int(old.name) < attempt - 1 or int(old.name) == attempt:
            shutil.rmtree(old, ignore_errors=True)
    folder = parent / str(attempt)
    folder.mkdir()
    return folder


def request_for(
    directive: Directive, *, run_uid: str, pod_ip: str, env: dict[str, str], folder: Path
) -> LaunchRequest:
    """The launch request that carries out `directive` with forked workers."""
    return LaunchRequest(
        attempt=directive.attempt,
        run_id=f"{run_uid}-{directive.attempt}",
        node_rank=directive.node_rank,
        nodes=directive.nodes,
        procs_per_node=directive.procs_per_node,
        master_addr=directive.master_addr,
        master_port=directive.master_port,
        local_addr=pod_ip,
        work_dir=str(folder),
        agent_pid=os.getpid(),
        fork=True,
        env=env,
    )


def describe_start(d: Directive, pids: list[int]) -> str:
    """The log line of workers that were started."""
    first = d.node_rank * d.procs_per_node
    ranks = f"rank {first}" if len(pids) == 1 else f"rank {first}-{first + len(pids) - 1}"
    return (
        f"attempt {d.attempt}: workers started (pid {' '.join(map(str, pids))}), "
        f"{ranks} of {d.nodes * d.procs_per_node}, master {d.master_addr}:{d.master_port}"
    )


def describe_failure(failure: Failure) -> str:
    """The log line of an attempt that failed here."""
    who = "the launcher" if failure.rank is None else f"rank {failure.rank}"
    code = "" if failure.exit_code is None else f" (exit code {failure.exit_code})"
    text = ": ".join(part for part in (failure.exception, failure.message) if part)
    echo = " [echo]" if failure.collateral else ""
    return f"attempt {failure.attempt}: {who} failed{code}: {text}{echo}"
