"""Signals' handlers, words for causes, and the store that they are written to."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from trainyard.elastic import notes
from trainyard.failure import PeerFailed, SIGTERMException, Watch, cause, ending
from trainyard.failure.board import Board
from trainyard.failure.cause import Cause
from trainyard.failure.signals import SigtermHandler
from trainyard_agent.rootcause import Death, is_echo, root_cause
from trainyard_api.contract import Env

BOUND_SECONDS = 20


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# ---- signals


def test_handler_that_was_there_runs_too_and_comes_back() -> None:
    said: list[str] = []
    mine = lambda *_: said.append("theirs")  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    handler = SigtermHandler(lambda: said.append("ours"))
    handler.install()
    send()
    send()
    handler.restore()
    assert said == ["ours", "theirs"] * 2
    assert signal.getsignal(signal.SIGTERM) is mine
    signal.signal(signal.SIGTERM, before)


def test_thread_hears_a_signal_while_the_main_thread_runs_no_python() -> None:
    heard = threading.Event()
    handler = SigtermHandler(lambda: None, heard.set)
    handler.install()
    blocked = threading.Lock()
    blocked.acquire()
    threading.Thread(target=lambda: (heard.wait(BOUND_SECONDS), blocked.release())).start()
    send()
    assert blocked.acquire(timeout=BOUND_SECONDS)
    assert heard.is_set()
    handler.restore()


def test_wake_up_descriptor_of_somebody_else_still_gets_its_bytes() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    heard = threading.Event()
    handler = SigtermHandler(lambda: None, heard.set)
    handler.install()
    send()
    assert heard.wait(BOUND_SECONDS)
    ours.settimeout(BOUND_SECONDS)
    assert ours.recv(8) == bytes([signal.SIGTERM])
    handler.restore()
    assert signal.set_wakeup_fd(-1) == theirs.fileno()
    ours.close()
    theirs.close()


def test_signal_to_a_forked_child_is_no_news_to_its_parent() -> None:
    """A loader's worker that is told to end must not stop the training."""
    heard = threading.Event()
    handler = SigtermHandler(lambda: None, heard.set)
    handler.install()
    pid = os.fork()
    if pid == 0:
        send()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    handler.restore()
    assert not heard.is_set()
    assert not handler.received


def test_outside_of_the_main_thread_nothing_is_installed() -> None:
    handler = SigtermHandler(lambda: None)
    thread = threading.Thread(target=lambda: (handler.install(), handler.restore()))
    thread.start()
    thread.join(BOUND_SECONDS)
    assert not handler.received


# ---- the watch of a world of one


def test_fit_learns_of_a_stop_at_its_next_look() -> None:
    with pytest.raises(SIGTERMException), Watch(graceful=True) as watcher:
        stop = watcher.open(0, 1)
        assert not stop.begins(1)
        send()
        send()
        assert stop.requested_by == "SIGTERM to rank 0"
        assert stop.begins(2)
        raise SIGTERMException
    assert stop.batch == 1


def test_other_entry_points_are_left_at_once() -> None:
    with pytest.raises(SIGTERMException) as stopped, Watch(graceful=False) as watcher:
        watcher.open(0, 1)
        send()
    assert stopped.value.code == 143


def test_stop_that_nobody_looked_for_is_sent_again() -> None:
    said: list[int] = []
    mine = lambda number, _: said.append(number)  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    with Watch(graceful=True) as watcher:
        watcher.open(0, 1)
        send()
    assert said == [signal.SIGTERM] * 2
    signal.signal(signal.SIGTERM, before)


def test_odd_grace_is_refused_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ending.GRACE_ENV, "soon")
    with pytest.raises(ValueError, match="TRAINYARD_GRACE_SECONDS: 'soon'"), Watch(graceful=True) as watcher:
        watcher.open(0, 1)


# ---- two ranks at a store


@pytest.fixture
def boards() -> Iterator[list[Board]]:
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=BOUND_SECONDS)
    )
    yield [Board(PrefixStore("p", store), "t", rank, 2) for rank in (0, 1)]


def test_last_number_makes_the_target(boards: list[Board]) -> None:
    boards[1].request_stop("SIGTERM to rank 1")
    for board in boards:
        board.wait(0, lambda: False)
        assert board.requested_by() == "SIGTERM to rank 1"
    boards[0].post(3)
    assert boards[1].target() is None
    boards[1].post(7)
    boards[0].wait(1, lambda: False)
    assert [board.target() for board in boards] == [7, 7]
    boards[0].await_posts()


def test_first_error_is_the_cause_and_wakes_everybody(boards: list[Board]) -> None:
    first = Cause.of(ValueError("no"), 1)
    assert boards[1].fail(first) == first
    assert boards[0].fail(Cause.of(RuntimeError("connection closed by peer"), 0)) == first
    for stage in range(3):
        boards[0].wait(stage, lambda: False)
    assert str(boards[0].error()) == "rank 1 failed: ValueError: no"


# ---- words for a launcher


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_record_for_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.delenv(Env.AGENT_SOCKET, raising=False)
    cause.record(raised(ValueError("no luck")))
    said: Any = json.loads((tmp_path / "error.json").read_text())["message"]
    assert said["message"] == "ValueError: no luck"
    assert "in raised" in said["extraInfo"]["py_callstack"]
    assert int(said["extraInfo"]["timestamp"]) > 0


def test_note_for_a_training_run_names_an_echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error-0.json"))
    monkeypatch.setenv(Env.AGENT_SOCKET, str(tmp_path / "none"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    cause.record(PeerFailed(f"{Cause.of(ValueError('no luck'), 3)}"))
    note = notes.read(notes.path_of(tmp_path, 0))
    assert note is not None
    echo = Death(0, 0, 1, note.time - 5, note.exception, note.message, note.text)
    real = Death(3, 0, 1, note.time, "ValueError", "no luck", "ValueError: no luck")
    assert is_echo(echo)
    assert not is_echo(real)
    assert root_cause(1, [echo, real]).rank == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[..]/unbound_buffer.cc:84] Timed out waiting 2000ms for recv operation to complete", True),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)", True),
        ("Connection closed by peer [127.0.0.1]:41", False),
    ],
)
def test_timeouts_of_collectives_are_known(text: str, expected: bool) -> None:
    assert cause.is_timeout(RuntimeError(text)) is expected
    assert cause.is_echo(RuntimeError(text))
