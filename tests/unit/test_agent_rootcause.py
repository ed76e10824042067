"""The cause among several dead ranks."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from trainyard_agent import termination
from trainyard_agent.rootcause import Death, describe, is_echo, root_cause, signal_name
from trainyard_api.protocol import Beat, Failure, Progress


def death(rank: int, code: int, time: float, exception: str = "", message: str = "", text: str = "") -> Death:
    return Death(rank, rank, code, time, exception, message, text)


ECHOES = [
    ("RuntimeError", "[gloo/transport/tcp/pair.cc:545] Connection closed by peer [10.1.2.3]:1234"),
    ("RuntimeError", "Read error [127.0.0.1]:18864: Connection reset by peer"),
    (
        "RuntimeError",
        "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
    ),
    ("RuntimeError", "Application timeout caused pair closure"),
    (
        "DistBackendError",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting",
    ),
    ("DistNetworkError", "failed to recv, got 0 bytes. Connection was likely closed."),
    ("BrokenPipeError", "[Errno 32] Broken pipe"),
    ("ConnectionResetError", "[Errno 104] Connection reset by peer"),
]


@pytest.mark.parametrize(("exception", "message"), ECHOES)
def test_what_peers_of_a_dead_rank_say_is_an_echo(exception: str, message: str) -> None:
    assert is_echo(death(0, 1, 1.0, exception, message))
    wrapped = death(
        0,
        1,
        1.0,
        "RuntimeError",
        "training failed",
        f"RuntimeError: training failed | {exception}: {message}",
    )
    assert is_echo(wrapped)


@pytest.mark.parametrize(
    "own",
    [
        death(0, 1, 1.0, "ValueError", "bad data"),
        death(0, 1, 1.0, "OutOfMemoryError", "CUDA out of memory"),
        death(0, -9, 1.0),
        death(0, -11, 1.0),
        death(0, 78, 1.0, "SystemExit", "exited with code 78"),
        death(0, 3, 1.0),
    ],
)
def test_what_a_rank_does_by_itself_is_not(own: Death) -> None:
    assert not is_echo(own)
    echo = death(1, 1, 0.5, *ECHOES[0])
    found = root_cause(7, [echo, own])
    assert (found.rank, found.collateral, found.attempt) == (0, False, 7)


def test_sigterm_is_what_siblings_get() -> None:
    assert is_echo(death(0, -15, 1.0))


def test_earliest_of_equals_and_an_echo_when_there_is_nothing_else() -> None:
    found = root_cause(1, [death(2, 1, 3.0, "ValueError", "b"), death(1, 1, 2.0, "KeyError", "a")])
    assert (found.rank, found.exception, found.message, found.time) == (1, "KeyError", "a", 2.0)
    found = root_cause(1, [death(3, 1, 3.0, *ECHOES[0]), death(2, 1, 2.0, *ECHOES[1])])
    assert (found.rank, found.collateral) == (2, True)


def test_message_is_one_short_line() -> None:
    found = root_cause(1, [death(0, 1, 1.0, "ValueError", "a\nb\x1b[31m" + "x" * 5000)])
    assert (
        len(found.message) == 1024 and found.message.startswith("a b [31mxx") and found.message.isprintable()
    )


def test_death_without_words_is_described() -> None:
    assert describe(death(0, -9, 1.0)) == "killed by signal 9 (SIGKILL)"
    assert describe(death(0, 3, 1.0)) == "exited with code 3"
    assert signal_name(99) == "signal 99"
    assert Death.from_json(json.loads(json.dumps(asdict(death(4, -9, 1.5))))) == death(4, -9, 1.5)
    with pytest.raises(KeyError):
        Death.from_json({"rank": 1})


def test_termination_message_is_json_and_fits() -> None:
    failure = Failure(attempt=3, rank=1, exit_code=1, exception="E" * 5000, message="\U0001f3d6" * 5000)
    beat = Beat(
        pod_name="p",
        pod_uid="u",
        incarnation="i",
        node_index=0,
        attempt=3,
        failure=failure,
        progress=Progress(step=12),
    )
    text = termination.of_beat(beat, outcome="failed", exit_code=1, message="")
    assert len(text.encode()) < 4096
    said = json.loads(text)
    assert (said["attempt"], said["outcome"], said["exitCode"], said["rank"], said["step"]) == (
        3,
        "failed",
        1,
        1,
        12,
    )
    assert len(said["message"]) > 200


@pytest.mark.parametrize(("code", "wanted"), [(None, 1), (0, 0), (78, 78), (-9, 137)])
def test_exit_code_of_an_agent_that_must_say_it_alone(code: int | None, wanted: int) -> None:
    assert termination.exit_code(Failure(attempt=1, exit_code=code)) == wanted
    assert termination.exit_code(None) == 0
