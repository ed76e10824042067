"""Around all that an entry point does: hears of SIGTERM and of errors, here and on the other ranks, and acts on it."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
from contextlib import suppress
from typing import Any

from trainyard.failure import cause as causes
from trainyard.failure import ending
from trainyard.failure.board import ERROR, STOP, TARGET, Board, find_store
from trainyard.failure.cause import Cause
from trainyard.failure.errors import SIGTERM_CODE, PeerFailed, SIGTERMException
from trainyard.failure.signals import SigtermHandler
from trainyard.failure.stop import FINISHED, GracefulStop
from trainyard.peers import Peers
from trainyard_api.contract import Env

CHANCE_SECONDS = 2.0
"""How long the main thread may take to notice by itself that another rank failed."""
_CAUSE_SECONDS = 0.5
"""How long a rank that meets a broken connection waits for the word of who broke it."""
_JOIN_SECONDS = 5.0
_numbers = itertools.count(1)
_open: list[Watch] = []
_MISMATCH = (
    "A collective did not complete in time. If no rank is dead or slow, the ranks did not call the same ones: "
    "self.log(..., sync_dist=True) with a name that only some ranks log, a collective inside `if is_global_zero`, "
    "or a loader that is shorter on some ranks, does that."
)


class Watch:
    """A context around one call of an entry point, on one rank: `open` it once the ranks are connected.

    graceful: SIGTERM leads to the `stop` that `open` returns (a fit); else to a SIGTERMException wherever the main thread
    is.
    """

    def __init__(self, *, graceful: bool) -> None:
        self.rank = 0
        self.stop = GracefulStop(left=self._seconds_left)
        self._graceful = graceful
        self._board: Board | None = None
        self._closed = self._posted = False
        self._leaving = threading.Event()
        """The main thread knows that this is the end."""
        self._told = threading.Event()
        self._peer: Cause | None = None
        self._error: BaseException | None = None
        self._deadline, self._teardown = ending.Deadline(), ending.Deadline()
        self._thread: threading.Thread | None = None
        self._handler: SigtermHandler | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.failed(error)
        self.close()

    def open(self, rank: int, world: int, store: Any = None) -> GracefulStop:
        """All ranks open the same number of them. `store`: where they met, if not the default process group's."""
        self.rank = rank
        ending.grace_seconds()  # an odd value shows now, and not when it is needed
        if world > 1 and (store := store or find_store()) is not None:
            attempt = f"{os.environ.get(Env.ATTEMPT, '')}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
            self._board = board = Board(store, f"trainyard/watch/{attempt}/{next(_numbers)}", rank, world)
            self.stop = GracefulStop(world, left=self._seconds_left)
            self._thread = threading.Thread(target=self._follow, args=(board,), name="watch", daemon=True)
            self._thread.start()
            self._handler = SigtermHandler(self._on_signal, lambda: self._heard(board))
        else:
            self._handler = SigtermHandler(self._on_signal)
        self._handler.install()
        _open.append(self)
        return self.stop

    def finish(self, peers: Peers) -> None:
        """Collective, when all is done: nobody is gone while another one still needs it. A SIGTERM that came too late for
        the loop is everybody's. Raises SIGTERMException."""
        if peers.any(self._graceful and self._handler is not None and self._handler.received):
            self.stop.acted = True
            raise SIGTERMException("stopped by SIGTERM when all was done")

    def failed(self, error: BaseException) -> None:
        """First thing when an exception has come out: tells the others, and bounds the time that is left.

        Before anything that could hang. What comes out after the first exception is no news.
        """
        if self._error is not None:
            return
        self._error = error
        self._leaving.set()
        if isinstance(error, SIGTERMException) and self.stop.acted:
            return  # all ranks do the same, and the deadline runs
        if self._board is None:
            causes.record(error)
            self._rescue(error)
            return
        code = SIGTERM_CODE if isinstance(error, SIGTERMException) else 1
        said = f"rank {self.rank} did not end by itself after {type(error).__name__}: {error}"
        self._teardown.start(ending.teardown_seconds(), code, said)
        ending.bound_interpreter_exit(ending.stop_seconds(), code)
        first = self._first_cause(self._board, error, code)
        if first.rank == self.rank:
            causes.record(error)
        else:
            error.add_note(f"{first}; this rank ends because of it")
            causes.record(PeerFailed(f"{first}\n\n{first.trace}"))
        self._rescue(error)

    def close(self) -> None:
        """Whatever happened. A SIGTERM that came too late to be acted on is sent again, to whom it concerns now."""
        self._closed = True
        self._leaving.set()
        if self in _open:
            _open.remove(self)
        if self._board is not None:
            self._leave_board(self._board)
        received = self._handler is not None and self._handler.received
        if self._handler is not None:
            self._handler.restore()
        self._teardown.cancel()
        self._deadline.cancel()
        if self.stop.acted:
            ending.bound_interpreter_exit(self._deadline.left + ending.EXIT_SECONDS, SIGTERM_CODE)
        elif received and self._graceful and self._error is None:
            os.kill(os.getpid(), signal.SIGTERM)

    def _leave_board(self, board: Board) -> None:
        with suppress(RuntimeError):  # the store may be gone with a rank that failed
            board.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)
        if self._error is None:
            with suppress(RuntimeError):
                if not self._posted:
                    board.post(FINISHED)
                if self.rank == 0:  # which may keep the store: not to be gone while others still speak
                    board.await_posts()

    # ---- SIGTERM

    def _on_signal(self) -> None:
        """In the main thread, between any two of its instructions."""
        if not self._graceful:
            if not self._leaving.is_set():
                raise SIGTERMException()
        elif self._board is None:
            self.stop.arm(self._request)
            self._start_deadline()

    def _heard(self, board: Board) -> None:
        """In the thread of the signals, even if the main thread does not get to its handler."""
        with suppress(RuntimeError):  # without the store the other thread knows what to do
            if board.error() is not None:
                return  # torchrun ends the siblings of a rank that failed: there is nobody to agree with
            if self._graceful:
                self._start_deadline()
                board.request_stop(self._request)
            elif not self._leaving.is_set():
                board.fail(Cause.sigterm(self.rank))
                if not self._leaving.wait(CHANCE_SECONDS):
                    ending.end_process(SIGTERM_CODE, f"rank {self.rank}: ended by SIGTERM")

    def _seconds_left(self) -> float:
        return self._deadline.left if self._deadline.runs else math.inf

    @property
    def _request(self) -> str:
        return f"SIGTERM to rank {self.rank}"

    def _start_deadline(self) -> None:
        seconds = ending.stop_seconds()
        line = (
            f"rank {self.rank} was asked to stop and did not get to a checkpoint within {seconds:g} s "
            f"(of {ending.GRACE_ENV}={ending.grace_seconds():g}); it ends without one"
        )
        self._deadline.start(seconds, SIGTERM_CODE, line)

    # ---- the other ranks

    def _follow(self, board: Board) -> None:
        """The thread of the board."""
        try:
            for stage in (STOP, TARGET, ERROR):
                board.wait(stage, lambda: self._closed)
                if self._closed:
                    return
                if (cause := board.error()) is not None:
                    self._peer_failed(cause)
                    return
                if stage == STOP:
                    self._agree(board)
                elif (target := board.target()) is not None:
                    self.stop.decide(target)
        except Exception as error:  # torch's errors of a lost connection have no common type
            if not self._closed:
                said = (
                    f"the store that the ranks met at is gone, and with it the process that kept it ({error})"
                )
                self._peer_failed(Cause(0, "", said))

    def _agree(self, board: Board) -> None:
        if self._graceful:
            self._start_deadline()
            number = self.stop.arm(board.requested_by())
        else:
            number = FINISHED  # cannot be: all ranks are in the same kind of entry point
        self._posted = True
        board.post(number)

    def _peer_failed(self, cause: Cause) -> None:
        if cause.rank == self.rank and self._leaving.is_set():
            return
        self._peer = cause
        self.stop.fail(str(cause))
        self._told.set()
        if self.stop.rescue is not None and cause.code != SIGTERM_CODE:
            # The main thread may hang for good in a reduction, or be on its way out: then it waits for this one.
            self._teardown.start(
                ending.teardown_seconds(), cause.code, f"{cause}; rank {self.rank} ends because of it"
            )
            self._rescue(None)
        if self._leaving.wait(CHANCE_SECONDS):
            return
        causes.record(PeerFailed(f"{cause}\n\n{cause.trace}"))
        ending.end_process(cause.code, f"{cause}; rank {self.rank} ends because of it")

    def _rescue(self, error: BaseException | None) -> None:
        """Before anything else is done on the way out: what is saved is worth more than all that comes after it."""
        if self.stop.rescue is not None:
            agree = None if self._board is None else self._board.agree
            self.stop.rescue(error, max(1.0, ending.teardown_seconds() - 1.0), agree)

    def _first_cause(self, board: Board, error: BaseException, code: int) -> Cause:
        if causes.is_echo(error):
            self._told.wait(_CAUSE_SECONDS)
        if self._peer is not None:
            return self._peer
        if causes.is_timeout(error):
            error.add_note(_MISMATCH)
        own = Cause.of(error, self.rank, code)
        try:
            return board.fail(own)
        except RuntimeError:  # the store went with the rank that failed
            return own


def child_failed(cause: Cause | None) -> bool:
    """Word of a launcher whose child failed, on its behalf. True if somebody listens.

    None: it was ended by SIGTERM; true if all ranks have agreed on that.
    """
    for watcher in _open:
        if cause is None:
            return watcher.stop.acted
        if watcher._board is not None:
            with suppress(RuntimeError):
                watcher._board.fail(cause)
                return True
    return False
