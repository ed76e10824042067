"""In a TrainingRun: two real agents with a rank each. The script says nothing of where it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.forkhost import ROOT, Host
from tests.trainer.pods import Gang
from trainyard_api.protocol import AgentPhase, Failure

SCRIPT = ROOT / "tests/trainer/failing.py"
RUN = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
os.environ.update(FAILING_CHECKPOINTS={{uri!r}}, TRAINYARD_GRACE_SECONDS="60")
sys.argv = [{str(SCRIPT)!r}, {{what!r}}, "1"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    gang = Gang(2)
    try:
        gang.warm()
        yield gang
    finally:
        gang.close()


def failures(gang: Gang, attempt: int) -> list[Failure]:
    found = [pod.phase(AgentPhase.FAILED, attempt).failure for pod in gang.pods]
    assert all(found)
    return [failure for failure in found if failure is not None]


def weights(output: str) -> str:
    found = re.search(r"steps 12 weights ([0-9a-f]{64})", output)
    assert found, output[-3000:]
    return found[1]


def test_sigterm_to_one_worker_is_saved_by_all_and_resumed(gang: Gang, host: Host, tmp_path: Path) -> None:
    uri = (tmp_path / "checkpoints").as_uri()
    attempt = gang.run(RUN.format(uri=uri, what="SIGTERM"))
    assert [failure.exit_code for failure in failures(gang, attempt)] == [143, 143]
    stopped = re.search(r"SIGTERM to rank 1: stopping after step (\d+), saving", gang.pods[0].text())
    assert stopped, gang.pods[0].text()[-3000:]
    attempt = gang.run(RUN.format(uri=uri, what="nothing"))
    for pod in gang.pods:
        pod.phase(AgentPhase.SUCCEEDED, attempt)
    output = gang.pods[0].text()
    assert f"resumed at step {stopped[1]} " in output
    unbroken = host.run([str(SCRIPT), "nothing", "0"], world=2)[0]
    assert weights(output) == weights(unbroken.output)


def test_only_the_rank_that_failed_is_the_cause(gang: Gang, tmp_path: Path) -> None:
    attempt = gang.run(RUN.format(uri=(tmp_path / "checkpoints").as_uri(), what="validation_step"))
    echo, cause = failures(gang, attempt)
    assert (cause.rank, cause.exception, cause.collateral) == (1, "ValueError", False)
    assert cause.message == "no luck in validation_step"
    assert echo.collateral, echo
