"""A run goes on with another number of ranks: the same global batches, each sample of an epoch once, the same schedule."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.elastic_story import Story
from tests.trainer.forkhost import Host

SCHEDULE = [(4, 3), (2, 5), (3, 9), (1, 12), (4, -1)]
"""Ranks, and until which step: 76 samples are 7 steps of 12 an epoch, all changes but one are in the middle of one."""
OPTIONS = {"epochs": 2, "samples": 76, "noise": False, "batch_norm": False, "plain": True}


def used(options: dict[str, Any]) -> int:
    """Samples of an epoch."""
    whole = 4 * 3
    samples = int(options["samples"])
    return samples - samples % whole if options.get("drop_last") else samples


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "more",
    [{}, {"drop_last": True, "workers": 2}, {"sampler": True, "accumulate": 2, "samples": 155}],
    ids=["plain", "drop_last, workers", "sampler, accumulation"],
)
def test_each_sample_once_and_the_same_steps(
    host: Host, tmp_path: Path, strategy: str, more: dict[str, Any]
) -> None:
    options = {**OPTIONS, "strategy": strategy, **more}
    unbroken = Story(host, tmp_path / "unbroken", **options).part(4)
    story = Story(host, tmp_path / "story", **options).parts(SCHEDULE)
    assert story.steps() == unbroken.steps(), "each step has the very samples that it would have had"
    for epoch in range(2):
        found = story.samples(epoch)
        assert set(found.values()) == {1}
        assert len(found) == used(options)
    for key in ("step", "epoch", "batches", "total", "planned", "per_epoch"):
        assert story.result[key] == unbroken.result[key], key


def test_the_gradient_is_that_of_the_mean_over_the_step(host: Host, tmp_path: Path) -> None:
    """In double precision: whatever the division into batches and their weights, the weights come out alike."""
    import torch

    options = {**OPTIONS, "precision": "64-true"}
    Story(host, tmp_path / "unbroken", **options).part(4)
    Story(host, tmp_path / "story", **options).parts(SCHEDULE)
    Story(host, tmp_path / "fsdp", **options, strategy="fsdp").parts([(2, 3), (3, -1)], batch=6)
    one, *others = (
        torch.load(tmp_path / name / "end.ckpt", weights_only=True)["state_dict"]
        for name in ("unbroken", "story", "fsdp")
    )
    for other in others:
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "then", "line"),
    [
        ({}, 2, "the global batch stays as it is: 2 ranks x 2 batches; 4 ranks x 1 batch when the run began"),
        ({}, 1, "the global batch stays as it is: 1 ranks x 4 batches; 4 ranks x 1 batch when the run began"),
        (
            {},
            3,
            "the global batch stays as it is, 12 samples: 3 ranks x 2 batches, smaller than 3; 4 ranks x 1 batch",
        ),
        ({"limit": 4}, 2, "the global batch stays as it is: 2 ranks x 2 batches"),
    ],
    ids=["4 to 2", "4 to 1", "4 to 3", "limited"],
)
def test_it_says_what_becomes_of_the_global_batch(
    host: Host, tmp_path: Path, options: dict[str, Any], then: int, line: str
) -> None:
    story = Story(host, tmp_path / "run", **{**OPTIONS, **options}).part(4, 2).part(then)
    assert story.output.count(line) == 1, story.output
    steps = 4 if options.get("limit") else 7
    assert (story.result["step"], story.result["planned"]) == (2 * steps, 2 * steps)


def test_another_batch_size_is_taken_as_it_is(host: Host, tmp_path: Path) -> None:
    """A script that divides its batch by the number of ranks is not corrected a second time."""
    story = Story(host, tmp_path / "run", **OPTIONS).part(4, 2).part(2, 5, batch=6)
    assert "global batch" not in story.output
    assert {sum(step.values()) for step in story.steps().values()} == {12}
    story.part(2, 7, batch=4)
    assert "the global batch is 8 samples from now on; it was 12" in story.output
    assert sum(story.steps()[5].values()) == 8


def test_a_schedule_of_accumulation_keeps_its_steps(host: Host, tmp_path: Path) -> None:
    options = {**OPTIONS, "samples": 96, "schedule": True, "epochs": 2}
    unbroken = Story(host, tmp_path / "unbroken", **options).part(2)
    story = Story(host, tmp_path / "story", **options).parts([(2, 3), (1, 10), (4, -1)])
    assert story.steps() == unbroken.steps()
    assert Counter(sum(step.values()) for step in story.steps().values()) == {12: 8, 6: 16}


def test_more_ranks_than_a_step_has_samples_for(host: Host, tmp_path: Path) -> None:
    """The ranks without a sample keep the others company."""
    options = {**OPTIONS, "samples": 20, "batch": 1, "epochs": 1}
    unbroken = Story(host, tmp_path / "unbroken", **options).part(2)
    story = Story(host, tmp_path / "story", **options).parts([(2, 4), (4, -1)])
    assert story.steps() == unbroken.steps()
