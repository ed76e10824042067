"""Kills of processes and pods at random steps: every run completes with the weights of the unbroken one."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from devcluster.scenario import Scenario
from tests.cluster.runs import ARGS, at_step, complete, final_sha

PROCESSES = 2
NODES = 2
KILLS_PER_RUN = 5
RUNS = 4


@pytest.fixture(scope="module")
def unbroken(module_scenario: Scenario) -> tuple[str, int]:
    """SHA-256 of the weights and number of steps of a run that nothing happened to."""
    module_scenario.submit("unbroken", module_scenario.spec(args=ARGS, nodes=NODES, processes=PROCESSES))
    status = complete(module_scenario, "unbroken")
    assert status["attempt"] == 1
    assert len(status["attempts"]) == 1
    return final_sha(module_scenario, "unbroken"), status["step"]


def _kills(seed: int, total: int) -> list[tuple[int, str, int]]:
    """(step, what, which): spread over the run; over all seeds each rank and each pod index is hit."""
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(5, total - 10), KILLS_PER_RUN))
    kinds = ["rank", "rank", "rank", "pod", "pod"]
    rng.shuffle(kinds)
    ranks = _round_robin(seed, NODES * PROCESSES)
    pods = _round_robin(seed, NODES)
    return [(s, k, next(ranks) if k == "rank" else next(pods)) for s, k in zip(steps, kinds, strict=True)]


def _round_robin(start: int, n: int) -> Iterator[int]:
    while True:
        yield start % n
        start += 1


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(RUNS))
def test_kills_at_random_steps_change_nothing(
    module_scenario: Scenario, unbroken: tuple[str, int], seed: int
) -> None:
    sha, total = unbroken
    name = f"broken-{seed}"
    module_scenario.submit(name, module_scenario.spec(args=ARGS, nodes=NODES, processes=PROCESSES))
    for number, (step, what, which) in enumerate(_kills(seed, total), 1):
        status = at_step(module_scenario, name, step)
        attempt = status["attempt"]
        before = module_scenario.pods(name)
        if what == "rank":
            module_scenario.kill_rank(name, which, per_node=PROCESSES)
        else:
            module_scenario.delete_pod(name, which)
        after = module_scenario.wait(
            name,
            f"recovery from kill {number} ({what} {which})",
            lambda s, a=attempt: _trains(s, a),
            seconds=90,
        )
        assert after["attempt"] == attempt + 1, "one failure is one attempt"
        kept = {i for i, pod in module_scenario.pods(name).items() if pod["uid"] == before[i]["uid"]}
        assert kept == (set(before) if what == "rank" else set(before) - {which}), "healthy pods are kept"
        cause = after["attempts"][-2]["cause"]
        assert cause["class"] == ("user" if what == "rank" else "infrastructure"), cause
        if what == "rank":
            assert (cause["rank"], cause["exitCode"]) == (which, -9), cause
    status = complete(module_scenario, name)
    assert status["attempt"] == KILLS_PER_RUN + 1
    assert status["step"] == total
    assert final_sha(module_scenario, name) == sha


def _trains(status: dict, attempt: int) -> bool:
    """A new attempt has taken its first new step."""
    return status["attempt"] > attempt and bool(status["attempts"][-1].get("firstStepTime"))
