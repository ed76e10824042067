"""`deterministic="elastic"`: the same bits at any number of processes, also when it changes in the middle of an epoch."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.elastic_story import SCRIPT, Story
from tests.trainer.forkhost import Host, Rank

SCHEDULE = [(4, 3), (2, 5), (3, 9), (1, 11), (4, -1)]
"""Processes, and until which step: 97 samples are 3 steps of 36 an epoch, 4 epochs; all but one change in the middle."""
EPOCHS = 4


def same(story: Story, unbroken: Story) -> None:
    """Weights, buffers, the optimizer's state and what was logged: bit by bit."""
    for key in (
        "weights",
        "optimizer",
        "values",
        "step",
        "epoch",
        "batches",
        "total",
        "planned",
        "per_epoch",
    ):
        assert story.result[key] == unbroken.result[key], key
    assert story.steps() == unbroken.steps()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2, "samples": 190, "workers": 2, "uneven": True, "batch_norm": False},
        {"sampler": True, "drop_last": True, "val_interval": 2, "samples": 140},
        {"precision": "bf16-mixed", "schedule": True, "samples": 170},
        {"precision": "16-mixed", "limit": 3, "batch_norm": False, "batch": 1, "samples": 41},
    ],
    ids=["plain", "accumulation, workers, unused", "sampler, drop_last", "bf16, schedule", "16-mixed, limit"],
)
def test_weights_do_not_depend_on_the_processes(host: Host, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"virtual": 12, "epochs": EPOCHS, **options}
    unbroken = Story(host, tmp_path / "unbroken", **options).part(1)
    story = Story(host, tmp_path / "story", **options).parts(SCHEDULE)
    assert len(unbroken.steps()) > SCHEDULE[-2][1], "the last part has nothing to do"
    same(story, unbroken)
    if not options.get("drop_last") and not options.get("limit"):
        every = Counter(range(options.get("samples", 97)))
        assert all(story.samples(epoch) == every for epoch in range(EPOCHS))


def test_any_number_of_processes_is_allowed_up_to_the_virtual_ranks(host: Host, tmp_path: Path) -> None:
    runs = [
        Story(host, tmp_path / str(world), virtual=5, epochs=1, batch_norm=False).part(world)
        for world in (1, 2, 3, 5)
    ]
    assert len({run.result["weights"] for run in runs}) == 1
    refused = Story(host, tmp_path / "6", virtual=5, epochs=1, batch_norm=False).part(6, code=1)
    assert "5 virtual ranks are too few for 6 processes; start at most 5" in refused.output


def test_killed_and_resumed_from_the_bucket(host: Host, run_env: dict[str, str], tmp_path: Path) -> None:
    """As a TrainingRun does it: SIGKILL at some step, and the next attempt has another number of processes."""
    elastic = {**run_env, "TRAINYARD_DETERMINISM": "elastic", "TRAINYARD_VIRTUAL_RANKS": "12"}
    options = {"epochs": EPOCHS, "engine": True, "folder": str(tmp_path)}
    unbroken = Story(host, tmp_path / "unbroken", virtual=12, epochs=EPOCHS).part(1)
    attempts = [(4, 5), (2, 8), (3, 10), (1, None)]
    for attempt, (world, kill_at) in enumerate(attempts, 1):
        env = {**elastic, "TRAINYARD_ATTEMPT": str(attempt)}
        given = json.dumps({**options, "delay": 0.02 if kill_at else 0})
        ranks = host.start([SCRIPT, given], world=world, env=env)
        if kill_at is not None:
            wait_for(tmp_path / "samples", kill_at, ranks[0])
            ranks[world - 1].kill()
        codes = host.wait(ranks, 60)
        assert codes[-1] == (-9 if kill_at is not None else 0), ranks[-1].output[-3000:]
        if attempt > 1:
            assert "resumed at step" in ranks[0].output
    (line,) = [x for x in ranks[0].output.splitlines() if x.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    for key in ("weights", "optimizer", "values", "step", "epoch", "total"):
        assert result[key] == unbroken.result[key], key


def test_stopped_in_the_middle_of_a_step(host: Host, run_env: dict[str, str], tmp_path: Path) -> None:
    """SIGTERM to one process, while the processes have different numbers of batches in each step: all end after one step,
    saved, and go on from it."""
    elastic = {**run_env, "TRAINYARD_DETERMINISM": "elastic", "TRAINYARD_VIRTUAL_RANKS": "7"}
    elastic["TRAINYARD_CHECKPOINT_EVERY_STEPS"] = "1000"
    options = {"epochs": 2, "engine": True, "batch_norm": False, "accumulate": 2}
    unbroken = Story(host, tmp_path / "unbroken", virtual=7, **{**options, "engine": False}).part(1)
    folder = tmp_path / "story"
    folder.mkdir()
    given = json.dumps({**options, "folder": str(folder), "delay": 0.03})
    ranks = host.start([SCRIPT, given], world=3, env=elastic)
    wait_for(folder / "samples", 2, ranks[0])
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert host.wait(ranks, 60) == [143, 143, 143], ranks[0].output[-3000:]
    assert "stopping after step" in ranks[0].output
    given = json.dumps({**options, "folder": str(folder)})
    ranks = host.run([SCRIPT, given], world=2, env={**elastic, "TRAINYARD_ATTEMPT": "2"})
    (line,) = [x for x in ranks[0].output.splitlines() if x.startswith("RESULT ")]
    assert json.loads(line.removeprefix("RESULT "))["weights"] == unbroken.result["weights"]
    every = [i for text in (folder / "samples").read_text().splitlines() for i in json.loads(text)["ids"]]
    assert Counter(every) == dict.fromkeys(range(97), 2), "nothing was done twice"


def wait_for(samples: Path, step: int, rank: Rank) -> None:
    end = time.monotonic() + 60
    while not (samples.exists() and f'{{"step": {step}, ' in samples.read_text()):
        assert time.monotonic() < end, f"step {step} was not reached\n{rank.output[-2000:]}"
        assert rank.code is None, rank.output[-2000:]
        time.sleep(0.01)


def test_without_it_the_bits_differ(host: Host, tmp_path: Path) -> None:
    """Nothing is random, and the global batch is kept: only the order of additions is another one."""
    options = {"noise": False, "batch_norm": False, "plain": True, "batch": 9, "epochs": EPOCHS}
    unbroken = Story(host, tmp_path / "unbroken", **options).part(4)
    story = Story(host, tmp_path / "story", **options).parts(SCHEDULE)
    assert story.steps() == unbroken.steps()
    assert story.result["weights"] != unbroken.result["weights"]


def test_without_keyed_generators_the_bits_differ(host: Host, tmp_path: Path) -> None:
    """The other tests could not fail if nothing random happened in a step."""
    script = tmp_path / "forgetful.py"
    script.write_text(
        "import runpy, sys\nimport trainyard.data.loader as loader\nimport trainyard.loops.fit as fit\n"
        "fit.seed_batch = lambda state, plan: None\nloader.reseed_cpu = lambda seed: None\n"
        f"runpy.run_path({str(Path(__file__).with_name('elastic_run.py'))!r}, run_name='__main__')\n"
    )
    found = set()
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        options = {"folder": str(folder), "virtual": 4, "epochs": 1, "batch_norm": False}
        ranks = host.run([str(script), json.dumps(options)], world=world)
        assert not any(rank.code for rank in ranks), ranks[0].output
        (line,) = [x for x in ranks[0].output.splitlines() if x.startswith("RESULT ")]
        found.add(json.loads(line.removeprefix("RESULT "))["weights"])
    assert len(found) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"virtual": 6},
            "virtual_ranks: 6, but the checkpoint is of a run with deterministic='elastic' and 4",
        ),
        ({"batch": 2}, "batch_size: 2, but the checkpoint is of a run with deterministic='elastic' and 3"),
        ({"accumulate": 2}, "accumulate_grad_batches: 2, but the checkpoint is of a run"),
    ],
    ids=["virtual ranks", "batch size", "accumulation"],
)
def test_what_would_lead_to_other_weights_is_refused(
    host: Host, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    story = Story(host, tmp_path / "run", virtual=4, epochs=2).part(2, 3)
    assert message in story.part(2, 5, code=1, **change).output


def test_a_run_may_become_elastic_and_cease_to_be(host: Host, tmp_path: Path) -> None:
    """The global batch stays what the virtual ranks made of it: each sample once, all steps of one size."""
    story = Story(host, tmp_path / "run", virtual=6, epochs=2, samples=72, noise=False, batch_norm=False)
    story.part(2, 2).part(3, 5, virtual=0).part(1, -1)
    assert {sum(step.values()) for step in story.steps().values()} == {18}
    assert story.samples(0) == story.samples(1) == Counter(range(72))
    assert story.result["step"] == 8
