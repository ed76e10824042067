"""The search for the largest batch size. Memory that ends is real: a tensor that no address space holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import trainyard as L
from tests.trainer.models import Regression, numbers, trainer
from trainyard.callbacks.batch_size_finder import BatchSizeFinder
from trainyard.errors import MisconfigurationException
from trainyard.tuner import Tuner
from trainyard.tuner.batch_size_search import BatchSizeSearch
from trainyard.tuner.oom import is_oom_error

HUGE = 1 << 50
"""Bytes."""


class Greedy(Regression):
    """Asks for more memory than there is when a batch has more than `room` samples."""

    def __init__(self, batch_size: int = 4, room: int = 100, samples: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.room, self.samples = batch_size, room, samples
        self.norm = torch.nn.BatchNorm1d(4)
        self.tried: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        self.tried.append(len(inputs))
        if len(inputs) > self.room:
            torch.empty(HUGE, dtype=torch.uint8)
        return torch.nn.functional.mse_loss(self.net(self.norm(inputs)), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)
        self.log("n", float(len(batch[0])), batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        self.training_step(batch, batch_idx)
        return len(batch[0])

    def train_dataloader(self) -> Any:
        return DataLoader(numbers(self.samples), self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def search(room: int, samples: int | None = None, **kwargs: Any) -> tuple[int | None, list[int]]:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= room

    return BatchSizeSearch(**kwargs).run(fits, samples), tried


@pytest.mark.parametrize(
    ("room", "kwargs", "found", "tried"),
    [
        (100, {}, 64, [2, 4, 8, 16, 32, 64, 128]),
        (100, {"max_trials": 3}, 8, [2, 4, 8]),
        (100, {"init_val": 300}, 75, [300, 150, 75]),
        (100, {"samples": 20}, 20, [2, 4, 8, 16, 20]),
        (10**9, {"max_val": 50}, 50, [2, 4, 8, 16, 32, 50]),
        (0, {"init_val": 4}, None, [4, 2, 1]),
        (20, {"mode": "binsearch", "init_val": 8, "margin": 0.0}, 20, [8, 16, 32, 24, 20, 22, 21]),
        (20, {"mode": "binsearch", "init_val": 8, "margin": 0.25}, 15, [8, 16, 32, 24, 20, 22, 21]),
        (1000, {"mode": "binsearch", "samples": 20, "margin": 0.25}, 20, [2, 4, 8, 16, 20]),
        (1, {"mode": "binsearch", "margin": 0.5}, 1, [2, 1]),
    ],
)
def test_which_sizes_are_tried(
    room: int, kwargs: dict[str, Any], found: int | None, tried: list[int]
) -> None:
    assert search(room, **kwargs) == (found, tried)


@pytest.mark.parametrize("wrong", [{"mode": "guess"}, {"init_val": 0}, {"margin": 1.0}, {"max_trials": 0}])
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=next(iter(wrong))):
        BatchSizeFinder(**wrong)


def test_what_counts_as_running_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(HUGE, dtype=torch.uint8)
    assert is_oom_error(real.value)
    assert is_oom_error(MemoryError()) and is_oom_error(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_oom_error(RuntimeError("shapes do not match")) and not is_oom_error(
        ValueError("out of memory")
    )


def test_the_largest_size_that_fits_is_found_and_nothing_else_remains() -> None:
    model, tuned = Greedy(room=20), trainer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    L.seed_everything(3, verbose=False)
    random = torch.get_rng_state()
    assert Tuner(tuned).scale_batch_size(model) == 16
    assert (model.batch_size, model.hparams.batch_size) == (16, 16)
    assert set(model.tried) == {2, 4, 8, 16, 32} and model.tried.count(16) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    model.tried.clear()
    tuned.fit(model)
    assert set(model.tried) == {16}
    fresh = Greedy(batch_size=16)
    trainer().fit(fresh)
    assert torch.equal(fresh.net.weight, model.net.weight)


def test_binsearch_takes_a_margin_off() -> None:
    model = Greedy(room=20)
    assert Tuner(trainer()).scale_batch_size(model, mode="binsearch", init_val=8, margin=0.1) == 18


def test_more_than_all_samples_is_not_tried() -> None:
    model = Greedy(samples=24)
    assert Tuner(trainer()).scale_batch_size(model) == 24
    assert max(model.tried) == 24


def test_the_callback_searches_and_the_fit_goes_on_as_if_it_had_known() -> None:
    class Planned(Greedy):
        """Its schedule depends on the number of steps, and so on the batch size."""

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    model, finder = Planned(room=20), BatchSizeFinder()
    fit = trainer(callbacks=[finder], max_epochs=2)
    fit.fit(model)
    assert (finder.optimal_batch_size, fit.num_training_batches, fit.global_step) == (16, 4, 8)
    told = Planned(batch_size=16)
    trainer(max_epochs=2).fit(told)
    assert torch.equal(told.net.weight, model.net.weight)


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_evaluation_has_its_own_size(method: str) -> None:
    model = Greedy(room=20)
    assert Tuner(trainer()).scale_batch_size(model, method=method) == 16
    assert model.batch_size == 16
    model = Greedy(room=20)
    run = trainer(callbacks=[BatchSizeFinder()])
    answer = getattr(run, method)(model)
    assert answer == [16] * 4 if method == "predict" else answer[0]["n"] == 16.0
    assert model.training


def test_a_data_module_may_hold_it() -> None:
    class Data(L.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 4

        def train_dataloader(self) -> Any:
            return DataLoader(numbers(64), self.batch_size)

    class Bare(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(batch[0]) > 20:
                raise MemoryError
            return self.loss(batch)

    data = Data()
    assert Tuner(trainer()).scale_batch_size(Bare(), datamodule=data) == 16
    assert data.batch_size == 16


def test_when_not_even_one_sample_fits_the_memory_error_comes_out() -> None:
    model = Greedy(room=0)
    with pytest.raises(RuntimeError, match="memory"):
        Tuner(trainer()).scale_batch_size(model)
    assert model.batch_size == 4


def test_other_errors_come_out_as_they_are() -> None:
    class Broken(Greedy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("a bug")

    model = Broken()
    with pytest.raises(KeyError, match="a bug"):
        Tuner(trainer()).scale_batch_size(model)
    assert model.batch_size == 4


def test_loaders_that_were_given_cannot_be_changed() -> None:
    with pytest.raises(MisconfigurationException, match="train_dataloader hook"):
        Tuner(trainer()).scale_batch_size(Greedy(), DataLoader(numbers(8), 2))
    with pytest.raises(MisconfigurationException, match="no size"):
        Tuner(trainer()).scale_batch_size(Greedy(), batch_arg_name="size")


def test_a_resumed_fit_keeps_the_size_that_it_had(tmp_path: Path) -> None:
    def run(max_epochs: int, ckpt: Path | None = None, max_steps: int = -1) -> tuple[Any, Greedy]:
        L.seed_everything(5, verbose=False)
        model = Greedy(room=20)
        fit = trainer(max_epochs=max_epochs, max_steps=max_steps, callbacks=[BatchSizeFinder()])
        fit.fit(model, ckpt_path=ckpt)
        return fit, model

    _, whole = run(2)
    half, _ = run(2, max_steps=6)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, model = run(2, tmp_path / "half.ckpt")
    assert (model.batch_size, resumed.global_step) == (16, 8)
    assert model.tried == [16] * 6  # two batches are left of the epoch, and the validation has four
    assert torch.equal(model.net.weight, whole.net.weight)
