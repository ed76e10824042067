"""kill -9 at any batch, with loaders that are not plain ones: real processes, one or two ranks."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter as Tally
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.forkhost import Host, Rank

SCRIPT = str(Path(__file__).with_name("loader_run.py"))


def lines(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    file = folder / f"rank-{rank}.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def end(ranks: list[Rank]) -> str:
    """Weights, metrics of each epoch, and the next random number."""
    found = re.search(r"^end (\w+ .*)$", ranks[0].output, re.M)
    assert found, ranks[0].output[-3000:]
    return found[1]


class Story:
    def __init__(self, host: Host, folder: Path, name: str, world: int) -> None:
        self.host, self.folder, self.name, self.world = host, folder, name, world
        self.attempts = 0
        self.resumed_at: list[int] = []
        self.kept: list[dict[str, Any]] = []

    def committed(self, run: str) -> bool:
        records = (self.folder / "store" / run / "commits").glob("*.json")
        return any(json.loads(record.read_text())["kind"] == "commit" for record in records)

    def attempt(self, run: str, *, kill_after: int | None = None, victim: int = 0) -> list[Rank]:
        self.attempts += 1
        log = self.folder / f"{run}-{self.attempts}"
        env = {
            "TRAINYARD_CHECKPOINT_URI": (self.folder / "store").as_uri(), "TRAINYARD_RUN_UID": run,
            "TRAINYARD_CHECKPOINT_EVERY_STEPS": "1", "TRAINYARD_ATTEMPT": str(self.attempts),
        }  # fmt: skip
        ranks = self.host.start([SCRIPT, self.name, str(log)], world=self.world, env=env)
        if kill_after is not None:
            limit = time.monotonic() + 60
            # Before its first commit a run that is killed has nothing to go on from, which would show nothing.
            while len(lines(log, victim)) < kill_after or not self.committed(run):
                assert time.monotonic() < limit, ranks[victim].output[-3000:]
                time.sleep(0.002)
            ranks[victim].kill()
        self.host.wait(ranks, 60)
        found = re.search(r"^begin (\d+)$", ranks[0].output, re.M)
        start = int(found[1]) if found else 0
        self.resumed_at.append(start)
        # What came after the checkpoint that this attempt began with has not happened.
        self.kept = [line for line in self.kept if line["batch"] <= start]
        self.kept += [line for rank in range(self.world) for line in lines(log, rank)]
        return ranks


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("drawing sampler", 1),
        ("batch sampler, workers", 1),
        ("max_size_cycle, workers", 1),
        ("StatefulDataLoader of an iterable, workers", 1),
        ("counting sampler, two ranks", 2),
        ("collection, two ranks", 2),
    ],
)
def test_killed_run_ends_like_an_unbroken_one(name: str, world: int, host: Host, tmp_path: Path) -> None:
    unbroken = Story(host, tmp_path / "unbroken", name, world)
    expected = end(unbroken.attempt("unbroken"))
    batches = len(lines(tmp_path / "unbroken" / "unbroken-1"))
    dice = random.Random(name)
    story = Story(host, tmp_path / "killed", name, world)
    story.attempt("killed", kill_after=dice.randint(5, batches * 2 // 3), victim=dice.randrange(world))
    story.attempt("killed", kill_after=dice.randint(1, 4), victim=dice.randrange(world))
    last = story.attempt("killed")
    assert any(story.resumed_at), "nothing was resumed: the test shows nothing"
    assert end(last) == expected


def test_two_ranks_use_each_sample_once_in_spite_of_a_kill(host: Host, tmp_path: Path) -> None:
    story = Story(host, tmp_path, "counting sampler, two ranks", 2)
    story.attempt("run", kill_after=7)
    story.attempt("run")
    assert story.resumed_at[1] > 0
    for epoch in range(3):
        used = [line for line in story.kept if line["epoch"] == epoch and not line["padding"]]
        assert Tally(n for line in used for n in line["labels"][0]) == Tally(range(23))
