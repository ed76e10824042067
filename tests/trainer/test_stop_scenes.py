"""SIGTERM to any one of two ranks, at any moment of a fit: one committed checkpoint at the last step that was done, and a
resume that ends like the unbroken run, bit by bit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.trainer.forkhost import ROOT, Host
from tests.trainer.stop_scenes import AGAIN, SCENES, STEPS


@pytest.fixture(scope="module")
def story(host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the two ranks saw: all scenes are played by the same processes."""
    folder = tmp_path_factory.mktemp("stop")
    script = str(ROOT / "tests/trainer/stop_scenes.py")
    env = {"TRAINYARD_GRACE_SECONDS": "60"}  # machines that do several things at once
    ranks = host.run(
        [script, str(folder / "found.json"), str(folder / "runs")], world=2, env=env, seconds=240
    )
    assert [r.code for r in ranks] == [0, 0], "\n".join(r.output[-3000:] for r in ranks)
    return json.loads((folder / "found.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SCENES)
def test_stop_loses_no_step_and_the_resume_is_exact(story: dict[str, Any], name: str) -> None:
    scene = story[name]
    unbroken = story["unbroken, 1 worker" if SCENES[name][0] == "loader" else "unbroken"]
    first, again, second = scene["first"], scene.get("again"), scene["second"]
    assert all(part["stopped"] for part in first)
    assert all(
        f"SIGTERM to rank {SCENES[name][1]}" in p["error"] or "both" in name or "other" in name for p in first
    )
    assert first[0]["step"] == first[1]["step"] == len(first[0]["done"])
    assert scene["first commit"] == (first[0]["step"] or -1)
    assert first[0]["errors"] == first[1]["errors"] == ["SIGTERMException"]
    for rank in (0, 1):
        assert not second[rank]["stopped"]
        assert first[rank]["done"] + second[rank]["done"] == list(range(1, STEPS + 1))
        validations = [part[rank]["validations"] for part in (first, again, second) if part]
        assert sum(validations) == unbroken["validations"]
        assert second[rank]["weights"] == unbroken["weights"]
    assert second[0]["next"] == unbroken["next"]
    assert scene["second commit"] == STEPS


def test_finished_run_has_nothing_left_to_do(story: dict[str, Any]) -> None:
    """Not even the validation that was given up, and then done without another step."""
    again = story[AGAIN]["again"]
    assert [(part["done"], part["validations"]) for part in again] == [([], 1)] * 2
    assert story[AGAIN]["second"][0]["validations"] == 0


@pytest.mark.parametrize(
    ("name", "step"), [("long validation", 4), ("long validation at an epoch's end", 10)]
)
def test_validation_is_given_up_when_all_ranks_are_in_it(story: dict[str, Any], name: str, step: int) -> None:
    """The fifth validation batch is in the second validation, after step 4: only the first one came to its end."""
    first = story[name]["first"]
    assert [part["step"] for part in first] == [step, step]
    assert [part["validations"] for part in first] == [step // 2 - 1] * 2
