"""The agent's main thread: one loop that owns all state, all child processes and all decisions."""

from __future__ import annotations

import os
import queue
import selectors
import signal
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from trainyard_agent import hearsay, termination
from trainyard_agent import state as states
from trainyard_agent.attempt import (
    Attempt,
    describe_failure,
    describe_start,
    request_for,
    work_dir,
)
from trainyard_agent.coordinator import Answer, Coordinator, Link, Mailbox, Refusal
from trainyard_agent.inbox import Inbox
from trainyard_agent.log import say
from trainyard_agent.logpump import LogPump
from trainyard_agent.prctl import become_subreaper
from trainyard_agent.processes import KILL_SECONDS, kill_all
from trainyard_agent.settings import Settings
from trainyard_agent.state import State, Verb
from trainyard_agent.uploader import Uploader
from trainyard_agent.zygote import LaunchFailed, Zygote
from trainyard_api.contract import Env, ExitCode
from trainyard_api.protocol import AgentPhase, Beat, Directive, Failure

DRAIN_RESERVE_SECONDS = 5.0
"""Part of the grace period that is kept for ending; the uploader has the rest."""
FAREWELL_SECONDS = 1.0
"""Longest wait for the last report to be delivered."""
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Agent:
    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        """Raises OSError when the runtime folder or the socket cannot be made, ValueError for a bad CA."""
        self._settings = settings
        self._worker_env = settings.worker_env(environ)
        settings.runtime_dir.mkdir(parents=True, exist_ok=True)
        become_subreaper()
        self._state = State(
            beat=Beat(
                pod_name=settings.pod_name,
                pod_uid=settings.pod_uid,
                incarnation=uuid.uuid4().hex,
                node_index=settings.node_index,
                pod_ip=settings.pod_ip,
                ready=not settings.use_zygote,
            )
        )
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._selector.register(self._wake_r, selectors.EVENT_READ, self._woken)
        self._answers: queue.SimpleQueue[Answer | Refusal] = queue.SimpleQueue()
        self._mailbox = Mailbox(self._state.beat)
        self._coordinator = Coordinator((self._link(), self._link()), self._mailbox, self._deliver)
        self._pump = LogPump()
        self._inbox = Inbox(settings.agent_socket, self._selector, self._worker_said)
        self._zygote = Zygote(
            self._worker_env | _ONE_THREAD, self._selector, changed=self._zygote_changed, warn=self._warn
        )
        self._zygote.usable = settings.use_zygote
        self._uploader = self._make_uploader()
        self._attempt: Attempt | None = None
        self._waiting: Directive | None = None
        """A RUN that waits for the zygote to be warm."""
        self._sweep = False
        """What is left of a failed attempt is to be killed."""
        self._reaped: dict[int, int] = {}
        """Children that ended before anybody knew them."""
        self._terminated = False
        self._exit: int | None = None
        self._outcome = ("running", "")
        self._heard_at = time.monotonic()
        self._ended_at = 0.0
        self._refused_since: float | None = None
        self._refused_said = False
        self._refusals = 0
        """Directives in a row about attempts that are over."""

    def _link(self) -> Link:
        s = self._settings
        return Link(s.coordinator_url, s.coordinator_ca, s.token_file, s.run_uid)

    @property
    def _drain_seconds(self) -> float:
        return max(self._settings.grace_seconds - DRAIN_RESERVE_SECONDS, 1.0)

    def _make_uploader(self) -> Uploader | None:
        s = self._settings
        if not s.checkpoint_uri:
            return None
        return Uploader(
            self._worker_env,
            s.uploader_socket,
            s.runtime_dir / "staging",
            self._drain_seconds,
            self._selector,
            heard=self._uploader_said,
            warn=self._warn,
        )

    # ---- the loop -----------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs until told to end; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_terminate)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler is needed for the wake-up descriptor
        signal.set_wakeup_fd(self._wake_w.fileno(), warn_on_full_buffer=False)
        say(f"pid {os.getpid()} for pod {self._settings.pod_name}, node index {self._settings.node_index}")
        self._pump.start()
        self._coordinator.start()
        try:
            while self._exit is None:
                self._step(60.0)
            return self._finish(self._exit)
        finally:
            signal.set_wakeup_fd(-1)

    def _step(self, bound: float) -> None:
        """Waits for something, at most `bound` seconds, and deals with it."""
        now = time.monotonic()
        due = [now + bound, self._zygote.tick(now), self._give_up_at()]
        if self._uploader:
            due.append(self._uploader.tick(now))
        for key, _ in self._selector.select(max(min(due) - now, 0.0)):
            if self._selector.get_map().get(key.fd) is key:  # a callback may have closed it
                callback: Callable[[], None] = key.data
                callback()
        self._reap()
        if self._terminated and self._exit is None:
            self._drain()
        while self._exit is None and not self._answers.empty():
            self._answered(self._answers.get())
        if self._sweep:
            self._kill()
        if self._exit is None and time.monotonic() >= self._give_up_at():
            self._give_up()

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            while self._wake_r.recv(4096):
                pass

    def _deliver(self, answer: Answer | Refusal) -> None:
        """Called by the HTTP threads: hands over, and wakes the loop."""
        self._answers.put(answer)
        with suppress(BlockingIOError):
            self._wake_w.send(b"a")

    def _on_terminate(self, _number: int, _frame: object) -> None:
        self._terminated = True

    def _reap(self) -> None:
        """Collects all dead children and tells whom it concerns."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if self._attempt is not None and pid == self._attempt.launcher:
                self._attempt.exited(code)
            elif not (self._zygote.exited(pid) or (self._uploader and self._uploader.exited(pid, code))):
                self._reaped[pid] = code

    def _become(self, new: State) -> None:
        """Takes over `new` and lets the coordinator know, at once if it cannot wait."""
        old, self._state = self._state, new
        if new.beat != old.beat:
            self._mailbox.publish(new.beat, urgent=states.urgent(old.beat, new.beat))

    def _warn(self, message: str) -> None:
        say(f"warning: {message}")
        self._become(states.warned(self._state, message))

    # ---- what the coordinator says ----------------------------------------------------------------------

    def _answered(self, answer: Answer | Refusal) -> None:
        now = time.monotonic()
        if isinstance(answer, Answer):
            self._heard_at, self._refused_since, self._refused_said = now, None, False
            self._obey(answer.directive)
        elif answer.status == 410:
            self._leave(ExitCode.OK, f"the coordinator says that this pod's run is gone: {answer.text}")
        elif answer.status in (401, 403, 426):
            self._refused_since = self._refused_since or now
            if now - self._refused_since >= self._settings.auth_seconds and not self._refused_said:
                self._refused_said = True
                say(
                    f"refused by the coordinator for {now - self._refused_since:.0f} s: {answer.status} {answer.text}"
                )
                if not self._state.running:
                    code = ExitCode.CONFIG if answer.status == 426 else 1
                    self._leave(code, f"refused by the coordinator: {answer.status} {answer.text}")
        elif answer.status == 503:
            self._heard_at = now

    def _obey(self, directive: Directive) -> None:
        verb = states.decide(self._state, directive)
        if verb is not Verb.REFUSE:
            self._refusals = 0
        if verb is Verb.EXIT:
            self._leave(directive.exit_code, f"told to exit: {directive.reason or 'no reason given'}")
        elif verb is Verb.REFUSE:
            # One answer may be overtaken by another; only a coordinator that insists is worth a line.
            self._refusals += 1
            if self._refusals == 3:
                newest = self._state.newest
                say(f"ignoring directives about attempt {directive.attempt}: attempt {newest} is newer")
        elif verb is Verb.LAUNCH:
            self._run_attempt(directive)
        else:
            if self._waiting is not None:
                say(f"attempt {self._waiting.attempt}: no longer to be run")
                self._waiting = None
            if verb is Verb.HOLD:
                self._kill()
                if self._exit is None:
                    say(
                        f"attempt {directive.attempt}: holding ({directive.reason or 'not everybody is ready'})"
                    )
                    self._become(states.held(self._state, directive.attempt))
            self._become(states.saw(self._state, directive))

    def _run_attempt(self, directive: Directive) -> None:
        if directive == self._waiting:
            return
        if problem := states.problem_of(directive):
            self._warn(f"attempt {directive.attempt} cannot be run as told: {problem}")
            return
        self._kill()
        if self._exit is None:
            self._become(states.held(self._state, directive.attempt))
            self._waiting = directive
            self._launch_waiting()

    # ---- attempts -----------------------------------------------------------------------------------

    def _zygote_changed(self) -> None:
        zygote = self._zygote
        say(f"zygote {'is warm' if zygote.warm else 'is not warm' if zygote.usable else 'is not used'}")
        self._become(states.warm(self._state, zygote.warm or not zygote.usable))
        self._launch_waiting()

    def _launch_waiting(self) -> None:
        """Starts what waits, if the zygote is warm, or there is none to wait for."""
        directive = self._waiting
        if directive is None or not (self._zygote.warm or not self._zygote.usable):
            return
        self._waiting = None
        self._become(states.saw(states.launched(self._state, directive.attempt), directive))
        attempt = self._attempt = Attempt(
            directive,
            self._selector,
            started=self._started,
            failed=self._failed,
            succeeded=self._succeeded,
        )
        self._reaped.clear()
        settings = self._settings
        try:
            request = request_for(
                directive,
                run_uid=settings.run_uid,
                pod_ip=settings.pod_ip,
                env=self._worker_env | {str(Env.ATTEMPT): str(attempt.number)},
                folder=work_dir(settings.runtime_dir, attempt.number),
            )
            attempt.launch(request, self._zygote, self._pump)
        except (OSError, LaunchFailed) as error:
            attempt.fail(f"{type(error).__name__}: {error}")
            return
        if (code := self._reaped.pop(attempt.launcher or 0, None)) is not None:
            attempt.exited(code)

    def _started(self, pids: list[int]) -> None:
        if self._attempt is not None:
            say(describe_start(self._attempt.directive, pids))

    def _failed(self, failure: Failure) -> None:
        say(describe_failure(failure))
        self._become(states.failed(self._state, failure))
        self._ended_at = time.monotonic()
        self._sweep = True
        self._write_termination("failed", failure.exit_code)

    def _succeeded(self) -> None:
        say(f"attempt {self._state.beat.attempt}: all local workers ended well")
        self._become(states.succeeded(self._state))
        self._ended_at = time.monotonic()

    def _kill(self) -> None:
        """No process of any attempt lives after this, or the agent ends with the names of those that do."""
        self._sweep = False
        attempt, self._attempt = self._attempt, None
        launcher = attempt.launcher if attempt else None
        if attempt:
            attempt.close()
            if self._state.running:
                say(f"attempt {attempt.number}: killing its workers")
                self._become(states.stopping(self._state))
        keep = {pid for pid in (self._zygote.pid, self._uploader.pid if self._uploader else None) if pid}
        survivors = kill_all(keep=keep, launcher=launcher, pod_uid=self._settings.pod_uid, reap=self._reap)
        if survivors:
            names = ", ".join(f"{p.name} (pid {p.pid}, state {p.state})" for p in survivors)
            say(f"still there {KILL_SECONDS:.0f} s after SIGKILL: {names}")
            self._leave(1, f"these processes cannot be killed, so this pod must be replaced: {names}")

    # ---- what children say ----------------------------------------------------------------------------

    def _worker_said(self, message: dict[str, Any]) -> None:
        """Raises ValueError, KeyError or TypeError for nonsense."""
        self._heard(hearsay.worker_said(self._state, message))

    def _uploader_said(self, message: dict[str, Any]) -> None:
        with suppress(KeyError, TypeError, ValueError):
            self._heard(hearsay.uploader_said(self._state, message))

    def _heard(self, heard: tuple[State, str]) -> None:
        new, line = heard
        if line:
            say(line)
        self._become(new)

    # ---- the end --------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """SIGTERM: the pod is to go."""
        say("SIGTERM: draining")
        if self._state.beat.phase is not AgentPhase.SUCCEEDED:  # what is done stays done
            self._become(states.draining(self._state))
        self._waiting = None
        self._mailbox.wait_delivered(FAREWELL_SECONDS / 2)
        self._leave(ExitCode.OK, "the pod was asked to stop")

    def _give_up_at(self) -> float:
        """Monotonic time at which an agent whose workers ended, and whom nobody answers, ends too."""
        if self._exit is not None or self._state.beat.phase not in (AgentPhase.SUCCEEDED, AgentPhase.FAILED):
            return float("inf")
        return max(self._ended_at, self._heard_at) + self._settings.lonely_seconds

    def _give_up(self) -> None:
        waited = f"{self._settings.lonely_seconds:.0f} s"
        code = termination.exit_code(self._state.beat.failure)
        self._leave(code, f"no answer from the coordinator for {waited} after the end")

    def _leave(self, code: int, why: str) -> None:
        """Ends the loop."""
        if self._exit is None:
            say(f"exiting with code {code}: {why}")
            self._exit = int(code)
            self._outcome = (str(self._state.beat.phase), why)

    def _finish(self, code: int) -> int:
        """Kills what is left, lets the uploader finish, says goodbye."""
        deadline = time.monotonic() + self._drain_seconds
        self._kill()
        zygote = self._zygote.pid
        self._zygote.close()
        if self._uploader:
            self._uploader.finish()
            while self._uploader.pid is not None and time.monotonic() < deadline:
                self._step(min(max(deadline - time.monotonic(), 0.0), 0.5))
            if self._uploader.pid is not None:
                say("the uploader did not finish in time; what it had not committed is lost")
                self._uploader.kill()
        if zygote is not None:
            with suppress(ProcessLookupError):
                os.kill(zygote, signal.SIGKILL)
        self._kill()
        outcome, why = self._outcome
        failed = self._state.beat.phase is AgentPhase.FAILED
        self._write_termination(outcome, code, "" if failed else why)
        if self._state.beat.phase is AgentPhase.DRAINING:
            self._mailbox.wait_delivered(FAREWELL_SECONDS / 2)
        self._coordinator.stop(FAREWELL_SECONDS / 2)
        self._pump.stop(FAREWELL_SECONDS)
        self._inbox.close()
        return code

    def _write_termination(self, outcome: str, code: int | None, message: str = "") -> None:
        termination.write(
            self._settings.termination_log,
            termination.of_beat(self._state.beat, outcome=outcome, exit_code=code, message=message),
        )
