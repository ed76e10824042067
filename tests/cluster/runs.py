"""What several files of this level say about digits runs."""

from __future__ import annotations

import re

from devcluster.scenario import Scenario

SAMPLES = 1437
"""scikit-learn's 1797 digits without every fifth, which is for validation."""
EPOCHS = 8
ARGS = ["--epochs", str(EPOCHS), "--batch-size", "32", "--step-delay", "0.05", "--audit-samples"]
SHA = re.compile(r"final weights sha256=([0-9a-f]{64})")
AUDIT = re.compile(r"samples: every one of (\d+) seen exactly (\d+) times")


def final_sha(scenario: Scenario, run: str) -> str:
    """SHA-256 of the final weights, as rank 0 printed it; asserts that every sample was used as often as it must."""
    log = scenario.logs(run, 0, tail=200)
    audit = AUDIT.search(log)
    assert audit, f"run {run}: no audit of the samples in the log:\n{log[-3000:]}"
    assert audit.groups() == (str(SAMPLES), str(EPOCHS)), audit.group(0)
    found = SHA.search(log)
    assert found, f"run {run}: no weights in the log:\n{log[-3000:]}"
    return found.group(1)


def complete(scenario: Scenario, run: str, *, seconds: float = 240) -> dict:
    """The status of a run that has completed."""
    return scenario.wait(run, "Complete", lambda s: s.get("phase") == "Complete", seconds=seconds)


def at_step(scenario: Scenario, run: str, step: int, *, seconds: float = 120) -> dict:
    """The status once the current attempt trains and has reached `step`."""
    return scenario.wait(
        run,
        f"step {step} in phase Running",
        lambda s: s.get("phase") == "Running" and (s.get("step") or 0) >= step,
        seconds=seconds,
    )
