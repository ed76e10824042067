"""Scripts that were written for Lightning (tests/trainer/ported), with another import: the same files, numbers, names and
weights as with the real Lightning, which runs in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import trainyard
from devcluster.venvs import environment
from tests.trainer.ported import run as runner
from trainyard.demos.boring_classes import BoringModel
from trainyard.errors import MisconfigurationException

Outcomes = dict[str, dict[str, Any]]
EXACT = ("step", "best", "kept", "last", "files", "metrics", "callback_metrics", "predicted")
"""Beside the weights."""


def start(python: Path | str, library: str, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PL_")}
    if library == "lightning":
        env = {k: v for k, v in env.items() if not k.startswith("PYTHON")}
    with (folder / f"{library}.log").open("wb") as log:
        return subprocess.Popen(
            [python, runner.__file__, library, folder, *more], env={**env, "OMP_NUM_THREADS": "1"},
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcomes, Outcomes]:
    """(Lightning's, ours) by script."""
    folder = tmp_path_factory.mktemp("ported")
    board = find_spec("tensorboard")
    assert board is not None
    assert board.origin is not None
    peers = environment("peers") / "bin" / "python"
    running = {
        "lightning": start(peers, "lightning", folder, str(Path(board.origin).parents[1])),
        "trainyard": start(sys.executable, "trainyard", folder),
    }
    try:
        for library, process in running.items():
            assert process.wait(240) == 0, (folder / f"{library}.log").read_text()[-4000:]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    lightning, trainyard = (json.loads((folder / f"{library}.json").read_text()) for library in running)
    return lightning, trainyard


@pytest.mark.parametrize("script", runner.SCRIPTS)
def test_weights_are_lightnings_bit_for_bit(outcomes: tuple[Outcomes, Outcomes], script: str) -> None:
    theirs, ours = (each[script]["weights"] for each in outcomes)
    assert len(theirs) >= 4
    assert ours == theirs


@pytest.mark.parametrize("script", runner.SCRIPTS)
def test_steps_names_and_files_are_lightnings(outcomes: tuple[Outcomes, Outcomes], script: str) -> None:
    theirs, ours = ({name: each[script][name] for name in EXACT if name in each[script]} for each in outcomes)
    assert theirs["step"] > 20
    assert any(name.endswith(".ckpt") for name in theirs["files"])
    assert ours == theirs


def test_an_early_stop_is_in_the_same_epoch(outcomes: tuple[Outcomes, Outcomes]) -> None:
    theirs, ours = (each["classifier"] for each in outcomes)
    assert 0 < theirs["stopped"] < 29
    assert (ours["stopped"], ours["epoch"]) == (theirs["stopped"], theirs["epoch"])


def test_a_callback_gets_its_state_back(outcomes: tuple[Outcomes, Outcomes]) -> None:
    theirs, ours = (each["adversaries"] for each in outcomes)
    assert ours["batches"] == theirs["batches"] == 4 * 8


def test_validations_are_at_the_same_steps(outcomes: tuple[Outcomes, Outcomes]) -> None:
    theirs, ours = (each["regression"] for each in outcomes)
    assert len(theirs["validated_at"]) > 8
    assert ours["validated_at"] == theirs["validated_at"]


@pytest.mark.parametrize("script", ["classifier", "regression"])
def test_metrics_go_to_the_same_columns_at_the_same_steps(
    outcomes: tuple[Outcomes, Outcomes], script: str
) -> None:
    """But for what is logged outside of a fit: after 24 steps that is step 23 here, like the last of the fit, and 24 in
    Lightning."""
    theirs, ours = (each[script]["columns"] for each in outcomes)
    assert list(ours) == list(theirs)
    (file,) = theirs
    assert set(ours[file]) == set(theirs[file])
    assert len(theirs[file]) >= 7
    last = outcomes[0][script]["step"]
    for name, steps in theirs[file].items():
        assert ours[file][name] == sorted({min(step, last - 1) for step in steps}), name


def test_curves_are_the_same(outcomes: tuple[Outcomes, Outcomes]) -> None:
    theirs, ours = (each["adversaries"]["curves"] for each in outcomes)
    assert {name: set(tags) for name, tags in ours.items()} == {
        name: set(tags) for name, tags in theirs.items()
    }
    assert len(theirs) == 2
    for name, tags in theirs.items():
        for tag, points in tags.items():
            assert [step for step, _ in ours[name][tag]] == [step for step, _ in points]
            # A mean over an epoch is summed up in another order: 1 unit in the last place.
            expected = [value for _, value in points]
            assert [value for _, value in ours[name][tag]] == pytest.approx(expected, rel=3e-7)


def test_returned_metrics_and_scores_are_the_same(outcomes: tuple[Outcomes, Outcomes]) -> None:
    for script, name in (("classifier", "tested"), ("regression", "validated")):
        theirs, ours = (each[script][name] for each in outcomes)
        theirs, ours = (x if isinstance(x, list) else [x] for x in (theirs, ours))
        assert [set(x) for x in ours] == [set(x) for x in theirs]
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(expected, rel=3e-7)
        assert outcomes[1][script]["score"] == pytest.approx(outcomes[0][script]["score"], rel=3e-7)


ABSENT = {"callbacks.ModelPruning", "callbacks.SpikeDetection", "loggers.LitLogger", "profilers.XLAProfiler"}
OTHER_DEFAULTS = {
    # Objects in place of which we have a word for them.
    ("callbacks.BackboneFinetuning", "lambda_func"), ("callbacks.RichProgressBar", "theme"),
    ("callbacks.StochasticWeightAveraging", "device"), ("callbacks.Timer", "interval"),
}  # fmt: skip


def test_arguments_and_defaults_are_lightnings(outcomes: tuple[Outcomes, Outcomes]) -> None:
    """Of the Trainer, its methods, and all callbacks, loggers and profilers: what the migration page calls the same."""
    theirs, ours = (each["signatures"] for each in outcomes)
    assert len(theirs) > 40
    assert len(theirs["Trainer.__init__"]) == 1 + 41
    assert set(theirs) - set(ours) == ABSENT
    different = [
        (name, argument, default, ours[name].get(argument))
        for name, arguments in theirs.items()
        if name not in ABSENT
        for argument, default in arguments.items()
        if ours[name].get(argument) != default
        and (argument in ours[name] or "**" not in ours[name])
        and (name, argument) not in OTHER_DEFAULTS
    ]
    assert not different


def test_only_import_lines_are_changed() -> None:
    """For all that the other tests say of scripts."""
    for name in runner.SCRIPTS:
        before = (Path(runner.__file__).parent / f"{name}.py").read_text().splitlines()
        after = runner.ported("\n".join(before)).splitlines()
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert len(changed) >= 3
        assert all(a.startswith(("import ", "from ")) and "trainyard" in b for a, b in changed)


def test_steps_that_fetch_their_batches_are_refused_by_name() -> None:
    class Fetches(BoringModel):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(MisconfigurationException, match=r"training_step\(dataloader_iter\) is not supported"):
        quiet_trainer().fit(Fetches())


def test_places_that_only_lightning_knows_are_refused_by_name() -> None:
    with pytest.raises(MisconfigurationException, match="a TrainingRun resumes by itself"):
        quiet_trainer().fit(BoringModel(), ckpt_path="hpc")


def test_an_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="'max_epoch'; the nearest is 'max_epochs'"):
        trainyard.Trainer(max_epoch=1)


def test_import_paths_of_lightning() -> None:
    theirs = import_module("trainyard.pytorch.core.optimizer").LightningOptimizer
    rank_zero_only = import_module("trainyard.pytorch.utilities.rank_zero").rank_zero_only

    from trainyard.core.optimizer import LightningOptimizer as ours
    from trainyard.utilities import rank_zero_only as only

    assert theirs is ours
    assert rank_zero_only is only


def quiet_trainer() -> trainyard.Trainer:
    return trainyard.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
