"""From where a run saves to a file, by the store's own bytes: S3 and a folder, and `python -m trainyard.export`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer import models
from trainyard.checkpoint.errors import NoUsableCheckpoint, StoreConfigError
from trainyard.export import ExportError, checkpoint_of_run, export_checkpoint
from trainyard.export.__main__ import main
from trainyard_api.checkpoints import Record, commit_key

ROOT = Path(__file__).parents[2]


class Model(models.Regression):
    """With hyperparameters, and an example."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.save_hyperparameters()
        self.example_input_array = torch.ones(1, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Kept(L.Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.weights: dict[int, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights[trainer.global_step] = pl_module.net.weight.detach().clone()


def trained(uri: str, **more: Any) -> dict[int, torch.Tensor]:
    """A run of 5 steps, which are few enough for its last checkpoints to be kept."""
    kept = Kept()
    config = L.CheckpointConfig(uri=uri, every_n_steps=2, run="run-1", **more)
    trainer = models.trainer(max_steps=5, max_epochs=-1, checkpoint=config, callbacks=[kept])
    trainer.fit(Model(lr=0.01), models.loader())
    return kept.weights


def saved(run: Path) -> list[Record]:
    """The commits: not all that were due, as a save that comes during another one is left out."""
    records = [
        Record.from_json(json.loads(path.read_text()), run=run.name, seq=int(path.stem))
        for path in sorted((run / "commits").iterdir())
    ]
    return [record for record in records if record.kind == "commit"]


def weights(path: Path) -> torch.Tensor:
    model = Model.load_from_checkpoint(path)
    assert model.hparams.lr == 0.01
    return model.net.weight.detach()


def test_the_newest_commit_in_a_bucket_becomes_a_file(
    s3: Any, prefix: str, s3_credentials: None, data_folder: Path, tmp_path: Path
) -> None:
    steps = trained(prefix, endpoint=s3.endpoint)
    before = {path: path.stat().st_mtime_ns for path in data_folder.rglob("*") if path.is_file()}
    run = f"{prefix}/run-1"
    path = tmp_path / "new" / "last.ckpt"
    assert checkpoint_of_run(run, path, endpoint=s3.endpoint) == 5
    assert torch.equal(weights(path), steps[5])

    older, _ = saved(data_folder / "run-1")[-2:]
    assert checkpoint_of_run(f"{run}/{commit_key(older.seq)}", path, endpoint=s3.endpoint) == older.step < 5
    assert torch.equal(weights(path), steps[older.step])
    assert before == {each: each.stat().st_mtime_ns for each in data_folder.rglob("*") if each.is_file()}

    with pytest.raises(NoUsableCheckpoint, match="no checkpoint commits/00000099"):
        checkpoint_of_run(f"{run}/commits/00000099.json", path, endpoint=s3.endpoint)
    with pytest.raises(NoUsableCheckpoint, match="run-2: no checkpoint"):
        checkpoint_of_run(f"{prefix}/run-2", path, endpoint=s3.endpoint)
    with pytest.raises(StoreConfigError):
        checkpoint_of_run("s3://nowhere/x/run-1", path, endpoint=s3.endpoint)
    assert torch.equal(weights(path), steps[older.step]), "a failure must leave the file"


def test_a_damaged_commit_is_passed_over_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = trained(tmp_path.as_uri())
    (shard,) = (tmp_path / "run-1" / "data").glob("step-000000000005/*/*.safetensors")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    path = tmp_path / "last.ckpt"
    older, _ = saved(tmp_path / "run-1")[-2:]
    assert checkpoint_of_run(f"{tmp_path.as_uri()}/run-1", path) == older.step < 5
    assert torch.equal(weights(path), steps[older.step])
    assert "SHA-256" in caplog.text


def test_a_place_that_is_none_is_refused(tmp_path: Path) -> None:
    for place in ("run-1", "https://example.org/run-1", "s3://bucket/", str(tmp_path)):
        with pytest.raises(ExportError, match="is not where a run saves"):
            checkpoint_of_run(place, tmp_path / "a.ckpt")


def test_a_run_is_exported_as_a_file_is(tmp_path: Path) -> None:
    steps = trained(tmp_path.as_uri())
    run = tmp_path / "run-1"
    for place in (run, run.as_uri()):
        path = export_checkpoint(Model, place, tmp_path / "model.pt2", dynamic_shapes="batch")
        found = torch.export.load(path).module()(torch.eye(4))
        assert torch.equal(torch.export.load(path).state_dict["net.weight"], steps[5])
        assert found.shape == (4, 1)


def test_the_command_is_a_program(tmp_path: Path) -> None:
    steps = trained(tmp_path.as_uri())
    run = f"{tmp_path.as_uri()}/run-1"
    paths = os.pathsep.join([str(ROOT / "trainer-image"), str(ROOT / "operator")])
    done = subprocess.run(
        [sys.executable, "-m", "trainyard.export", "--checkpoint", run, "--output", "last.ckpt"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"last.ckpt: step 5 of {run}\n"), done
    assert torch.equal(weights(tmp_path / "last.ckpt"), steps[5])


def test_the_command_exports_and_says_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = str(tmp_path / "last.ckpt"), str(tmp_path / "model.pt2")
    trainer = models.trainer(max_steps=1)
    trainer.fit(Model(), models.loader())
    trainer.save_checkpoint(file)
    module = ["--module", "tests.trainer.test_export_runs:Model"]
    capsys.readouterr()
    assert main([*module, "--checkpoint", file, "--output", output, "--dynamic-batch"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == output
    assert torch.export.load(output).module()(torch.ones(3, 4)).shape == (3, 1)

    for wrong, told in {
        ("--checkpoint", f"{file}x", "--output", "a.onnx", *module): "last.ckptx",
        ("--checkpoint", file, "--output", "a.xyz", *module): "suffix '.xyz'",
        ("--checkpoint", file, "--output", "a.onnx"): "--module is needed",
        ("--checkpoint", file, "--output", "a.onnx", "--module", "tests:Nothing"): "'tests:Nothing'",
        ("--checkpoint", file, "--output", "a.onnx", "--module", "nothing.here:Nothing"): "nothing",
        ("--checkpoint", file, "--output", "a.pth", *module, "--dynamic-batch"): "no option 'dynamic_shapes'",
    }.items():
        assert main(list(wrong)) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and told in err, (wrong, err)
    leftovers = {path.name for path in tmp_path.iterdir()}
    assert leftovers == {"last.ckpt", "model.pt2"}
