"""An exception on one rank: what all ranks had completed is committed, and the resume ends like a run that never failed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer.exception_run import ACCUMULATE, BATCH, EPOCHS, EVERY, SAMPLES
from tests.trainer.forkhost import ROOT, Host, Rank
from tests.trainer.models import Regression, loader, trainer
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.stores import open_store
from trainyard.data import once
from trainyard.strategies.base import Strategy
from trainyard_api.checkpoints import Record, commits_newest_first

SCRIPT = str(ROOT / "tests/trainer/exception_run.py")


def steps_of_an_epoch(world: int) -> int:
    return SAMPLES // (BATCH * ACCUMULATE * world)


class Story:
    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.folder, self.attempts = host, folder, 0

    def attempt(
        self, moment: str, rank: int, step: int, *, world: int, strategy: str = "", saves: bool = True,
        script: str = SCRIPT,
    ) -> list[Rank]:  # fmt: skip
        self.attempts += 1
        env = {"TRAINYARD_ATTEMPT": str(self.attempts), "TRAINYARD_GRACE_SECONDS": "30"}
        env |= {"EXCEPTION": "1"} if saves else {}
        self.folder.mkdir(exist_ok=True)
        argv = [script, str(self.folder), moment, str(rank), str(step), *([strategy] if strategy else [])]
        return self.host.run(argv, world=world, env=env, seconds=90)

    def newest(self) -> Record:
        config = CheckpointConfig(uri=(self.folder / "runs").as_uri(), run="r")
        return commits_newest_first(CommitLog(open_store(config), "r").refresh())[0]


def end(rank: Rank) -> str:
    found = re.search(r"^END .*$", rank.output, re.MULTILINE)
    assert found, rank.output[-3000:]
    return found[0]


@pytest.fixture(scope="module")
def unbroken(host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[str]]:
    """By world and strategy: how the ranks end when nothing is raised, with nothing kept for that case."""
    found = {}
    for world, strategy in ((1, ""), (2, ""), (2, "fsdp")):
        story = Story(host, tmp_path_factory.mktemp("unbroken"))
        ranks = story.attempt("never", 0, 0, world=world, strategy=strategy, saves=False)
        found[world, strategy] = [end(rank) for rank in ranks]
    return found


SOUND = (
    "training_step", "in the middle of an accumulation", "loader", "on_train_batch_start", "validation_step",
    "on_train_epoch_start",
)  # fmt: skip
AFTER_THE_REDUCTION = ("on_after_backward",)
UNSOUND = ("optimizer", "on_train_batch_end")


def when(moment: str, world: int) -> int:
    if moment == "on_train_epoch_start":
        return steps_of_an_epoch(world)
    return 8 if moment != "validation_step" else 4 if world == 2 else 8


@pytest.mark.parametrize(
    ("world", "rank", "moment"),
    [
        *((1, 0, moment) for moment in (*SOUND, *AFTER_THE_REDUCTION)),
        *((2, rank, moment) for rank, moment in enumerate(SOUND[:4])),
        *((2, 1, moment) for moment in SOUND[3:]),
    ],
)
def test_the_last_complete_step_is_saved(
    host: Host, tmp_path: Path, unbroken: dict[tuple[int, str], list[str]], world: int, rank: int, moment: str
) -> None:
    rank, step = rank % world, when(moment, world)
    assert step % EVERY, "else it would be saved anyhow"
    story = Story(host, tmp_path)
    failed = story.attempt(moment, rank, step, world=world)
    assert all(r.code for r in failed)
    assert "no luck" in failed[rank].output
    record = story.newest()
    assert (record.step, record.reason) == (step, "exception"), "\n".join(r.output[-3000:] for r in failed)
    assert "loss" in record.metrics
    resumed = story.attempt(moment, rank, step, world=world)
    assert f"resumed at step {step}" in resumed[0].output
    assert [end(r) for r in resumed] == unbroken[world, ""]
    last = story.newest()
    assert (last.step, last.reason) == (EPOCHS * steps_of_an_epoch(world), "end")
    assert last.failures == 0, "nothing was lost"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("moment", UNSOUND)
def test_what_is_torn_is_not_saved(
    host: Host, tmp_path: Path, unbroken: dict[tuple[int, str], list[str]], world: int, moment: str
) -> None:
    story = Story(host, tmp_path)
    failed = story.attempt(moment, world - 1, 8, world=world)
    assert all(r.code for r in failed)
    assert story.newest().step == 5
    assert "in the middle of what belongs to a step" in failed[0].output
    resumed = story.attempt(moment, world - 1, 8, world=world)
    assert "resumed at step 5" in resumed[0].output
    assert [end(r) for r in resumed] == unbroken[world, ""]


def test_ranks_that_are_a_step_apart_make_no_commit(
    host: Host, tmp_path: Path, unbroken: dict[tuple[int, str], list[str]]
) -> None:
    """After the reduction the other rank goes on: it is held in time, or has completed a step that this one has not."""
    story = Story(host, tmp_path)
    failed = story.attempt("on_after_backward", 1, 8, world=2)
    assert all(r.code for r in failed)
    assert story.newest().step in (5, 8)
    resumed = story.attempt("on_after_backward", 1, 8, world=2)
    assert [end(r) for r in resumed] == unbroken[2, ""]


def test_sharded_parameters_are_saved_by_each_rank(
    host: Host, tmp_path: Path, unbroken: dict[tuple[int, str], list[str]]
) -> None:
    story = Story(host, tmp_path)
    failed = story.attempt("training_step", 1, 8, world=2, strategy="fsdp")
    assert all(r.code for r in failed)
    assert story.newest().step == 8, "\n".join(r.output[-3000:] for r in failed)
    resumed = story.attempt("training_step", 1, 8, world=2, strategy="fsdp")
    # Each rank has running statistics of its own here, and rank 0's count: the other's show in the validation's metric.
    assert end(resumed[0]).split("{")[0] == unbroken[2, "fsdp"][0].split("{")[0]


def test_without_the_option_nothing_is_saved(host: Host, tmp_path: Path) -> None:
    story = Story(host, tmp_path)
    story.attempt("training_step", 0, 8, world=1, saves=False)
    assert story.newest().step == 5


def test_a_step_that_is_saved_already_is_not_saved_again(
    host: Host, tmp_path: Path, unbroken: dict[tuple[int, str], list[str]]
) -> None:
    story = Story(host, tmp_path)
    story.attempt("training_step", 1, 5, world=2)
    assert (story.newest().step, story.newest().reason) == (5, "steps")
    assert [end(r) for r in story.attempt("training_step", 1, 5, world=2)] == unbroken[2, ""]


@pytest.mark.parametrize(
    "forgotten",
    [
        "drawn=draws()",
        "buffers={}",
        "callbacks={}",
        "groups=[[m._settings(g) for g in o.param_groups] for o in self._trainer.optimizers]",
    ],
)
def test_without_what_is_kept_of_the_step_it_would_differ(
    host: Host, tmp_path: Path, unbroken: dict[tuple[int, str], list[str]], forgotten: str
) -> None:
    """The other tests could not fail if the step that failed left nothing behind."""
    script = tmp_path / "forgetful.py"
    script.write_text(
        "import dataclasses, runpy, sys\n"
        "import trainyard.trainer.moment as m\n"
        "from trainyard.reproducibility import draws\n"
        "whole = m.Moments.payload\n"
        f"m.Moments.payload = lambda self, moment: whole(self, dataclasses.replace(moment, {forgotten}))\n"
        f"sys.argv[0] = {SCRIPT!r}\n"
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
    )
    story = Story(host, tmp_path / "run")
    story.attempt("training_step", 0, 8, world=1, script=str(script))
    assert story.newest().step == 8
    assert [end(r) for r in story.attempt("training_step", 0, 8, world=1)] != unbroken[1, ""]


class Extra(Regression):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1


class Notes(L.Callback):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["notes"] = 1


class Scaled(torch.nn.Linear):
    def get_extra_state(self) -> Any:
        return {"scale": 1.0}

    def set_extra_state(self, state: Any) -> None: ...


class Stateful(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = Scaled(4, 1)


@pytest.mark.parametrize(
    "who", ["Extra.on_save_checkpoint", "Notes.on_save_checkpoint", "Scaled", "strategy", ""]
)
def test_what_could_not_be_put_together_later_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, who: str
) -> None:
    module = {"Extra.on_save_checkpoint": Extra, "Scaled": Stateful}.get(who, Regression)()
    if who == "strategy":  # deepspeed's and XLA's, which need devices
        monkeypatch.setattr(Strategy, "gathers_state", True)
    config = CheckpointConfig(uri=tmp_path.as_uri(), run="r", on_exception=True)
    made = trainer(checkpoint=config, callbacks=[Notes()] if who.startswith("Notes") else [])
    monkeypatch.setattr(once, "_said", set())
    with caplog.at_level("WARNING"):
        made.fit(module, loader())
    refused = [r.message for r in caplog.records if "nothing will be saved on an exception" in r.message]
    assert (made.rescue is None) == bool(who)
    assert bool(refused) == bool(who)
    assert who in "".join(refused)
