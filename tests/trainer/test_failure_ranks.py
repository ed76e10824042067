"""One rank fails, in whatever way: all end soon, and say which one it was and why.

Each wait below has a bound that is far under what the ranks would wait for each other (30 minutes).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.trainer.forkhost import ROOT, Host

SCRIPT = str(ROOT / "tests/trainer/failing.py")
BOUND_SECONDS = 60


@pytest.mark.parametrize(
    ("what", "victim"),
    [
        ("prepare_data", 0), ("setup", 1), ("configure_optimizers", 0), ("training_step", 1), ("validation_step", 0),
        ("on_fit_end", 1),
    ],
)  # fmt: skip
def test_exception_on_one_rank_ends_all(host: Host, what: str, victim: int) -> None:
    """In training_step a callback of the failing rank hangs as well, in on_exception."""
    env = {"TRAINYARD_GRACE_SECONDS": "8"}
    ranks = host.run([SCRIPT, what, str(victim)], world=2, env=env, seconds=BOUND_SECONDS)
    failed, other = ranks[victim], ranks[1 - victim]
    assert failed.code == 1
    assert f"ValueError: no luck in {what}" in failed.output
    assert other.code == 1
    assert f"rank {victim} failed: ValueError: no luck in {what}; " in other.output


def test_killed_rank_ends_the_others(host: Host) -> None:
    ranks = host.run([SCRIPT, "SIGKILL", "1"], world=2, seconds=BOUND_SECONDS)
    assert [r.code for r in ranks] == [1, -9]
    assert "RuntimeError" in ranks[0].output


def test_collective_that_only_one_rank_calls_is_explained(host: Host) -> None:
    """The strategy's timeout is two seconds."""
    ranks = host.run([SCRIPT, "collective", "1"], world=2, seconds=BOUND_SECONDS)
    assert [r.code for r in ranks] == [1, 1]
    assert "A collective did not complete in time" in ranks[1].output
    assert "rank 1 failed: " in ranks[0].output


def test_rank_that_cannot_stop_is_ended(host: Host, tmp_path: Path) -> None:
    env = {"TRAINYARD_GRACE_SECONDS": "4", "FAILING_CHECKPOINTS": tmp_path.as_uri()}
    ranks = host.run([SCRIPT, "stuck", "1"], world=2, env=env, seconds=BOUND_SECONDS)
    assert ranks[1].code == 143
    assert "rank 1 was asked to stop and did not get to a checkpoint within 2 s" in ranks[1].output
    assert ranks[0].code in (1, 143)


def test_interrupt_is_an_error_of_its_rank(host: Host) -> None:
    ranks = host.run([SCRIPT, "SIGINT", "0"], world=2, seconds=BOUND_SECONDS)
    assert all(r.code not in (0, None) for r in ranks)
    assert "KeyboardInterrupt" in ranks[0].output
    assert "rank 0 failed: KeyboardInterrupt; " in ranks[1].output


def test_alone(host: Host, tmp_path: Path) -> None:
    """A world of one: no store, no threads."""
    env = {"FAILING_CHECKPOINTS": tmp_path.as_uri(), "TRAINYARD_GRACE_SECONDS": "30"}
    argv = [SCRIPT, "SIGTERM", "0", "auto"]
    stopped = host.run(argv, env=env, seconds=BOUND_SECONDS)[0]
    assert stopped.code == 143
    assert "SIGTERM to rank 0: stopping after step 5, saving" in stopped.output
    resumed = host.run([SCRIPT, "nothing", "0", "auto"], env=env, seconds=BOUND_SECONDS)[0]
    unbroken = host.run([SCRIPT, "nothing", "0", "auto"], seconds=BOUND_SECONDS)[0]
    assert "resumed at step 5" in resumed.output
    assert weights(resumed.output) == weights(unbroken.output)


def weights(output: str) -> str:
    found = re.search(r"steps 24 weights ([0-9a-f]{64})", output)
    assert found, output[-2000:]
    return found[1]
