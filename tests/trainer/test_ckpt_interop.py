"""Files that Lightning wrote, and files that Lightning reads: with the real one, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from devcluster.venvs import environment
from tests.trainer import ckpt_peer

WHOLE = {"trainer": {"max_epochs": 4}}
HALF = {"trainer": {"max_epochs": 2}}
MIDDLE = 7
"""Steps, of five in an epoch."""


def lightning(folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    python = environment("peers") / "bin" / "python"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PL_"))}
    done = subprocess.run(
        [python, ckpt_peer.__file__, folder / "jobs.json"], env={**env, "OMP_NUM_THREADS": "1"}, cwd=folder,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    found: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
    return found


def ours(job: dict[str, Any]) -> dict[str, Any]:
    return ckpt_peer.run("trainyard", job)


def saves(folder: Path, **when: Any) -> dict[str, Any]:
    return {"dirpath": str(folder), "filename": "saved", "save_top_k": -1, **when}


def writing(folder: Path) -> list[dict[str, Any]]:
    """A whole run; one that is saved after two epochs; one saved at an epoch's end, one in the middle of an epoch."""
    return [
        WHOLE,
        HALF | {"save": str(folder / "half.ckpt")},
        HALF | {"checkpoint": saves(folder / "end", every_n_epochs=2, save_on_train_epoch_end=True)},
        {"trainer": {"max_steps": MIDDLE, "max_epochs": 4}, "checkpoint": saves(folder / "mid", every_n_train_steps=MIDDLE)},
        HALF | {"checkpoint": saves(folder / "val", every_n_epochs=2, save_on_train_epoch_end=False)},
    ]  # fmt: skip


FILES = ("half.ckpt", "end/saved.ckpt", "mid/saved.ckpt", "val/saved.ckpt")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("theirs")
    return folder, lightning(folder, writing(folder))[0]


def test_both_libraries_train_alike(theirs: tuple[Path, dict[str, Any]]) -> None:
    """Otherwise the rest would say nothing."""
    assert ours(WHOLE)["weights"] == theirs[1]["weights"]


@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on_from_lightnings_file(
    theirs: tuple[Path, dict[str, Any]], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also in the middle of an epoch: with the samples that are left, where Lightning itself begins at the first."""
    folder, whole = theirs
    found = ours(WHOLE | {"resume": str(folder / name)})
    assert {k: found[k] for k in ("weights", "step", "rate")} == {
        k: whole[k] for k in ("weights", "step", "rate")
    }
    assert (found["epoch"], found["seen"], found["best"]) == (4, 1, whole["best"])
    (said,) = [r.message for r in caplog.records if "was written by Lightning" in r.message]
    assert ("after 2 batches of an order of our own" in said) == (name == "mid/saved.ckpt")


def test_a_module_is_made_of_lightnings_file(theirs: tuple[Path, dict[str, Any]]) -> None:
    from trainyard import LightningModule

    path = theirs[0] / "half.ckpt"
    model_class, data_class = ckpt_peer.make(__import__("trainyard"))
    model = model_class.load_from_checkpoint(path)
    assert isinstance(model, LightningModule)
    assert model.hparams == {"lr": 0.05, "width": 3}
    held = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(held[name], value) for name, value in model.state_dict().items())
    data = data_class.load_from_checkpoint(path)
    assert (data.hparams, data.seen) == ({"count": 20}, 1)


def test_lightning_goes_on_from_our_files(theirs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    whole = theirs[1]
    for job in writing(tmp_path):
        written = ours(job)
    jobs = [WHOLE | {"resume": str(tmp_path / name)} for name in FILES]
    loaded = WHOLE | {"weights_of": str(tmp_path / "half.ckpt")}
    *resumed, module = lightning(tmp_path, [*jobs, loaded | {"trainer": {}}])
    for name, found in zip(FILES, resumed, strict=True):
        assert (found["epoch"], found["step"], found["seen"]) == (4, 20, 1), name
        if name != "mid/saved.ckpt":  # from there Lightning begins the epoch's data anew
            assert found["weights"] == whole["weights"], name
            assert (found["rate"], found["best"]) == (whole["rate"], whole["best"]), name
    assert module["hparams"] == {"lr": 0.05, "width": 3}
    assert module["weights"] == written["weights"]
