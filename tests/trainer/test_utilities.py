"""Import paths and small helpers that ported code uses."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module
from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer.models import Regression, loader, trainer
from trainyard.demos import boring_classes
from trainyard.utilities.grads import grad_norm
from trainyard.utilities.memory import get_model_size_mb, is_oom_error, move_data_to_device, recursive_detach
from trainyard.utilities.model_helpers import is_overridden
from trainyard.utilities.rank_zero import (
    LightningDeprecationWarning,
    WarningCache,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)

PATHS = (
    "callbacks.Callback", "callbacks.base.Callback", "callbacks.ModelCheckpoint", "callbacks.EarlyStopping",
    "callbacks.early_stopping.EarlyStopping", "core.module.LightningModule", "core.datamodule.LightningDataModule",
    "demos.boring_classes.BoringModel", "loggers.CSVLogger", "loggers.TensorBoardLogger", "plugins.precision.Precision",
    "profilers.SimpleProfiler", "strategies.DDPStrategy", "trainer.Trainer", "trainer.states.TrainerFn",
    "tuner.tuning.Tuner", "utilities.CombinedLoader", "utilities.combined_loader.CombinedLoader",
    "utilities.exceptions.MisconfigurationException", "utilities.exceptions.SIGTERMException", "utilities.grad_norm",
    "utilities.memory.garbage_collection_cuda", "utilities.model_summary.ModelSummary", "utilities.rank_zero_only",
    "utilities.rank_zero.rank_zero_info", "utilities.seed.isolate_rng", "utilities.types.STEP_OUTPUT",
    "utilities.types.OptimizerLRScheduler",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_both_import_paths_give_one_object(path: str) -> None:
    module, _, name = path.rpartition(".")
    one, other = import_module(f"trainyard.{module}"), import_module(f"trainyard.pytorch.{module}")
    assert one is other
    assert one.__spec__ is not None
    assert one.__spec__.name == f"trainyard.{module}"
    assert getattr(one, name) is getattr(other, name)


ALIAS = """
import sys
import trainyard.pytorch as pl
assert "torch" not in sys.modules, "the alias costs nothing"
from trainyard.pytorch.callbacks.early_stopping import EarlyStopping
import trainyard
assert pl.callbacks is trainyard.callbacks and pl.callbacks.EarlyStopping is EarlyStopping
assert pl.Trainer is trainyard.Trainer is sys.modules["trainyard.trainer.trainer"].Trainer
assert trainyard.pytorch is pl and trainyard.utilities.rank_zero_only is pl.utilities.rank_zero.rank_zero_only
try:
    import trainyard.pytorch.nothing
except ModuleNotFoundError as error:
    assert "trainyard.pytorch.nothing" in str(error)
else:
    raise AssertionError
print("good", len([n for n in sys.modules if n.endswith(".early_stopping")]))
"""


def test_the_alias_in_a_fresh_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALIAS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["good", "2"]


def test_submodules_are_attributes() -> None:
    assert L.callbacks is import_module("trainyard.callbacks")
    with pytest.raises(AttributeError, match="no attribute 'calbacks'"):
        _ = L.calbacks


# ---- rank zero


def test_rank_zero_only(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    @rank_zero_only
    def one() -> int:
        return 1

    monkeypatch.delenv("RANK", raising=False)
    assert one() == 1
    monkeypatch.setenv("RANK", "1")
    caplog.set_level("INFO", "trainyard")
    answers: list[int | None] = [one(), rank_zero_only(lambda: 1, default=7)()]
    assert answers == [None, 7]
    rank_zero_info("not said")
    monkeypatch.setattr(rank_zero_only, "_rank", 0)
    rank_zero_info("said %d", 5)
    assert one() == 1
    assert [r.message for r in caplog.records] == ["said 5"]
    assert caplog.records[0].filename == "test_utilities.py"


def test_rank_zero_warnings_name_their_caller() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rank_zero_warn("careful")
        rank_zero_deprecation("old")
        cache = WarningCache()
        cache.warn("once")
        cache.warn("once")
    assert [(str(w.message), w.category) for w in caught] == [
        ("careful", UserWarning), ("old", LightningDeprecationWarning), ("once", UserWarning)
    ]  # fmt: skip
    assert {w.filename for w in caught} == {__file__}


# ---- tensors


@pytest.mark.parametrize("p", [2, 1.0, "inf"])
def test_grad_norm(p: float | str) -> None:
    model = Regression()
    assert grad_norm(model, p) == {}
    model.loss(next(iter(loader()))).backward()  # type: ignore[no-untyped-call]
    norms = grad_norm(model, p, group_separator="-")
    gradients = {n: q.grad for n, q in model.named_parameters() if q.grad is not None}
    kind = f"grad_{float(p)}_norm"
    assert list(norms) == [f"{kind}-net.weight", f"{kind}-net.bias", f"{kind}_total"]
    for name, gradient in gradients.items():
        assert torch.allclose(norms[f"{kind}-{name}"], torch.linalg.vector_norm(gradient, float(p)))
    whole = torch.cat([g.flatten() for g in gradients.values()])
    assert torch.allclose(norms[f"{kind}_total"], torch.linalg.vector_norm(whole, float(p)))
    with pytest.raises(ValueError, match="norm_type"):
        grad_norm(model, 0)


def test_memory() -> None:
    model = torch.nn.Linear(1000, 250, bias=False)
    assert get_model_size_mb(model) == pytest.approx(1.0, rel=0.01)
    assert is_oom_error(torch.cuda.OutOfMemoryError("x"))
    assert is_oom_error(RuntimeError("CUDA error: out of memory"))
    assert not is_oom_error(RuntimeError("shape mismatch"))
    moved = move_data_to_device({"a": [torch.zeros(1)], "b": "text"}, torch.device("meta"))
    assert (moved["a"][0].device.type, moved["b"]) == ("meta", "text")
    kept = recursive_detach({"a": {"b": torch.zeros(1, requires_grad=True) * 2}, "c": 1}, to_cpu=True)
    assert (kept["a"]["b"].requires_grad, kept["c"]) == (False, 1)


def test_is_overridden() -> None:
    model = Regression()
    assert is_overridden("training_step", model)
    assert not is_overridden("validation_step", model)
    assert not is_overridden("training_step")
    with pytest.raises(ValueError, match="has no 'train_step'"):
        is_overridden("train_step", model)
    with pytest.raises(ValueError, match="a str is no module"):
        is_overridden("join", "")


# ---- demos


@pytest.mark.parametrize("kind", ["BoringModel", "ManualOptimBoringModel"])
def test_the_boring_model_does_everything(kind: str) -> None:
    model = getattr(boring_classes, kind)()
    fit = trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=2, enable_checkpointing=False)
    before = model.layer.weight.detach().clone()
    fit.fit(model)
    assert not torch.equal(before, model.layer.weight)
    fit.validate(model, verbose=False)
    fit.test(model, verbose=False)
    predictions = fit.predict(model)
    assert predictions is not None
    assert len(predictions) == 64


def test_the_boring_data() -> None:
    fit = trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=2, enable_checkpointing=False)
    fit.fit(boring_classes.BoringModel(), datamodule=boring_classes.BoringDataModule())
    assert fit.global_step == 4

    class Dicts(boring_classes.BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert torch.equal(batch["a"] + 2, batch["b"])
            return self.step(batch["a"])

    for data, length in (
        (boring_classes.RandomDictDataset(32, 6), 3),
        (boring_classes.RandomIterableDataset(32, 6), 3),
        (boring_classes.RandomIterableDatasetWithLen(32, 6), 3),
    ):
        model = (
            Dicts() if isinstance(data, boring_classes.RandomDictDataset) else boring_classes.BoringModel()
        )
        fit = trainer(max_epochs=1, limit_val_batches=0, enable_checkpointing=False)
        fit.fit(model, torch.utils.data.DataLoader(data, 2))
        assert fit.global_step == length
