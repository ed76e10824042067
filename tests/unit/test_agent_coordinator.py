"""The agent's side of the protocol against a real HTTP server: order, retries, TLS, and nothing that waits for ever."""

from __future__ import annotations

import queue
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.fake_coordinator import FakeCoordinator
from trainyard_agent.coordinator import Answer, Coordinator, Link, Mailbox, Refusal
from trainyard_api.protocol import Action, AgentPhase, Beat, Directive, Progress

BEAT = Beat(pod_name="p", pod_uid="u", incarnation="i", node_index=0)


@pytest.fixture
def server() -> Iterator[FakeCoordinator]:
    server = FakeCoordinator()
    yield server
    server.down()


class Talk:
    """A mailbox, the two threads, and what they delivered."""

    def __init__(self, server: FakeCoordinator, folder: Path) -> None:
        token = folder / "token"
        token.write_text(server.token + "\n")
        self.mailbox = Mailbox(BEAT)
        self.answers: queue.SimpleQueue[Answer | Refusal] = queue.SimpleQueue()
        links = (Link(server.url, "", token, "run"), Link(server.url, "", token, "run"))
        self.coordinator = Coordinator(links, self.mailbox, self.answers.put)
        self.coordinator.start()

    def directive(self, wanted: Directive) -> None:
        """Until it was delivered."""
        while True:
            answer = self.answers.get(timeout=10)
            if isinstance(answer, Answer) and answer.directive == wanted:
                return

    def refusal(self) -> Refusal:
        while True:
            answer = self.answers.get(timeout=10)
            if isinstance(answer, Refusal):
                return answer


@pytest.fixture
def talk(server: FakeCoordinator, tmp_path: Path) -> Iterator[Talk]:
    talk = Talk(server, tmp_path)
    yield talk
    talk.coordinator.stop(5)
    assert not [t for t in threading.enumerate() if t.name in ("poller", "reporter")]


def test_a_change_is_told_while_the_long_poll_is_held(server: FakeCoordinator, talk: Talk) -> None:
    nothing = Directive(action=Action.HOLD, reason="nothing to do")
    talk.directive(nothing)
    seen = replace(BEAT, seen=nothing.revision)
    talk.mailbox.publish(seen, urgent=False)
    server.wait_for("u", lambda b: b.seen == nothing.revision and b.wait > 0)
    talk.mailbox.publish(replace(seen, phase=AgentPhase.FAILED), urgent=True)
    at, beat = server.wait_for("u", lambda b: b.phase is AgentPhase.FAILED)
    assert beat.wait == 0.0
    assert talk.mailbox.wait_delivered(5)
    # What can wait goes with the next beat of the poller.
    talk.mailbox.publish(replace(seen, phase=AgentPhase.FAILED, progress=Progress(step=3)), urgent=False)
    _, beat = server.wait_for("u", lambda b: b.progress is not None, since=at)
    assert beat.wait > 0


def test_a_new_directive_ends_the_long_poll(server: FakeCoordinator, talk: Talk) -> None:
    nothing = Directive(action=Action.HOLD, reason="nothing to do")
    talk.directive(nothing)
    talk.mailbox.publish(replace(BEAT, seen=nothing.revision), urgent=False)
    server.wait_for("u", lambda b: b.seen == nothing.revision)
    leave = Directive(action=Action.EXIT, attempt=4, exit_code=3, reason="done")
    server.direct("u", leave)
    talk.directive(leave)


def test_snapshots_never_go_back_in_time(server: FakeCoordinator, talk: Talk) -> None:
    for step in range(200):
        talk.mailbox.publish(replace(BEAT, progress=Progress(step=step)), urgent=True)
        time.sleep(0.001)
    server.wait_for("u", lambda b: b.progress is not None and b.progress.step == 199)
    beats = [b for _, b in server.beats["u"] if b.progress]
    # The server's threads may note down the two connections' beats in either order; each connection's are in order.
    for connection in (0.0, 2.0):
        steps = [b.progress.step for b in beats if b.wait == connection and b.progress]
        assert steps == sorted(steps)
    assert len(beats) > 10


def test_outage_is_survived_and_the_state_told_after_it(server: FakeCoordinator, talk: Talk) -> None:
    server.wait_for("u", lambda b: True)
    server.down()
    talk.mailbox.publish(replace(BEAT, phase=AgentPhase.FAILED), urgent=True)
    assert talk.refusal().status == 0
    assert not talk.mailbox.wait_delivered(0.05)
    server.up()
    server.wait_for("u", lambda b: b.phase is AgentPhase.FAILED)
    assert talk.mailbox.wait_delivered(5)


@pytest.mark.parametrize("status", [401, 403, 410, 426, 503])
def test_other_answers_are_handed_over(server: FakeCoordinator, talk: Talk, status: int) -> None:
    server.status = status
    while (refusal := talk.refusal()).status != status:
        assert refusal.status == 0
    assert "as the test wishes" in refusal.text


def test_missing_token_is_no_crash(server: FakeCoordinator, tmp_path: Path) -> None:
    link = Link(server.url, "", tmp_path / "none", "run")
    answer = link.exchange(threading.Lock(), lambda: BEAT)
    link.close()
    assert isinstance(answer, Refusal) and answer.status == 0 and "none" in answer.text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make certificates")
def test_tls_trusts_the_given_authority_only(server: FakeCoordinator, tmp_path: Path) -> None:
    def certificate(name: str) -> tuple[Path, Path]:
        key, cert = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-keyout", key, "-out", cert, "-days", "2", "-subj", f"/CN={name}",
             "-addext", "subjectAltName=IP:127.0.0.1"],
            check=True, capture_output=True, timeout=30,
        )  # fmt: skip
        return key, cert

    key, cert = certificate("ours")
    _, other = certificate("other")
    token = tmp_path / "token"
    token.write_text(server.token)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.encrypt(context)
    url = server.url.replace("http:", "https:")
    for ca, good in ((cert, True), (other, False)):
        link = Link(url, ca.read_text(), token, "run")
        answer = link.exchange(threading.Lock(), lambda: BEAT)
        link.close()
        assert isinstance(answer, Answer) is good, answer
    assert isinstance(answer, Refusal) and "CERTIFICATE_VERIFY_FAILED" in answer.text
