"""What a Trainer's arguments about data do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import trainyard as L
from tests.trainer.loaders import Handmade, StatefulStream, stateful
from tests.trainer.models import trainer
from trainyard.data.once import _said
from trainyard.errors import MisconfigurationException
from trainyard.utilities.combined_loader import CombinedLoader


class Numbers(Dataset[torch.Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.tensor(number)


class Seen(L.LightningModule):
    """Notes what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.trained: list[Any] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained.append(_plain(batch))
        return self.net(torch.ones(1)).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated.append((dataloader_idx, _plain(batch)))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return _plain(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def _plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {k: _plain(v) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return [_plain(v) for v in batch]
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def fit(train: Any, val: Any = None, **options: Any) -> tuple[Seen, L.Trainer]:
    model, run = Seen(), trainer(num_sanity_val_steps=0, **options)
    run.fit(model, train, val)
    return model, run


# The expected values of these are what Lightning 2.6.6 was seen to do.


def test_overfitting_uses_the_same_few_batches_in_order(caplog: pytest.LogCaptureFixture) -> None:
    _said.clear()
    model, _ = fit(
        DataLoader(Numbers(12), 2, shuffle=True), DataLoader(Numbers(30), 2, shuffle=True),
        overfit_batches=3, max_epochs=2,
    )  # fmt: skip
    assert model.trained == [[0, 1], [2, 3], [4, 5]] * 2
    assert model.validated == [(0, [0, 1]), (0, [2, 3]), (0, [4, 5])] * 2
    said = {r.getMessage() for r in caplog.records if "overfit" in r.getMessage()}
    assert said == {
        f"overfit_batches: the {stage} DataLoader is read in order, not shuffled"
        for stage in ("train", "val")
    }
    model, _ = fit(DataLoader(Numbers(12), 2), DataLoader(Numbers(12), 2), overfit_batches=0.5)
    assert model.trained == [[0, 1], [2, 3], [4, 5]]
    assert len(model.validated) == 3


@pytest.mark.parametrize(
    ("mode", "limit", "batches"),
    [
        ("max_size_cycle", None, 9), ("max_size_cycle", 4, 4), ("max_size_cycle", 0.5, 4), ("max_size", None, 9),
        ("max_size", 0.5, 4), ("min_size", None, 3), ("min_size", 4, 3), ("min_size", 0.5, 1),
    ],
)  # fmt: skip
def test_limits_of_collections(mode: str, limit: Any, batches: int) -> None:
    parts = {"a": DataLoader(Numbers(9)), "b": DataLoader(Numbers(3))}
    model, run = fit(CombinedLoader(parts, mode), limit_train_batches=limit)
    other = {"max_size": [0, 1, 2] + [None] * 6}.get(mode, [0, 1, 2] * 3)
    expected = [{"a": [n], "b": None if other[n] is None else [other[n]]} for n in range(batches)]
    assert model.trained == expected
    assert run.num_training_batches == batches == run.global_step


def test_a_plain_collection_cycles_and_evaluation_goes_through_it() -> None:
    model, _ = fit(
        [DataLoader(Numbers(4)), DataLoader(Numbers(3))],
        {"x": DataLoader(Numbers(3)), "y": DataLoader(Numbers(1))},
    )
    assert model.trained == [[[0], [0]], [[1], [1]], [[2], [2]], [[3], [0]]]
    assert model.validated == [(0, [0]), (0, [1]), (0, [2]), (1, [0])]


def test_evaluation_of_a_combined_loader() -> None:
    val = CombinedLoader([DataLoader(Numbers(3)), DataLoader(Numbers(1))], "max_size_cycle")
    model, _ = fit(DataLoader(Numbers(4)), val)
    assert model.validated == [(0, [[0], [0]]), (0, [[1], [0]]), (0, [[2], [0]])]
    val = CombinedLoader([DataLoader(Numbers(2)), DataLoader(Numbers(1))], "sequential")
    model, _ = fit(DataLoader(Numbers(4)), val)
    assert model.validated == [(0, [0]), (0, [1]), (1, [0])]


def test_a_fraction_of_less_than_a_batch_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"limit_val_batches=0\.1 of this val loader"):
        fit(DataLoader(Numbers(4)), DataLoader(Numbers(4)), limit_val_batches=0.1)


def test_loaders_are_made_anew_every_n_epochs() -> None:
    made: list[int] = []

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            assert self.trainer is not None
            made.append(self.trainer.current_epoch)
            return DataLoader(Numbers(2 + len(made)))

    model = Seen()
    trainer(max_epochs=5, reload_dataloaders_every_n_epochs=2).fit(model, datamodule=Data())
    assert made == [0, 2, 4]
    assert len(model.trained) == 3 + 3 + 4 + 4 + 5


class Interrupt(L.Callback):
    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.loop_state.total_batches == self.after:
            trainer.save_checkpoint(self.path)
            raise KeyError("stop")


def test_accumulation_that_changes_from_epoch_to_epoch_goes_on(tmp_path: Path) -> None:
    """Six batches: three steps of two in epoch 1, two of three in epoch 2."""

    def run(callbacks: list[L.Callback], **options: Any) -> tuple[int, list[Any]]:
        from trainyard.callbacks import GradientAccumulationScheduler

        L.seed_everything(3, verbose=False)
        model = Seen()
        own = trainer(max_epochs=3, callbacks=[GradientAccumulationScheduler({1: 2, 2: 3}), *callbacks])
        try:
            own.fit(model, DataLoader(Numbers(12), 2, shuffle=True), **options)
        except KeyError:
            return own.global_step, model.trained
        return own.global_step, [*model.trained, [w.tolist() for w in model.parameters()]]

    whole = run([])
    assert whole[0] == 6 + 3 + 2
    begun = run([Interrupt(tmp_path / "a.ckpt", 8)])
    assert begun[0] == 7
    rest = run([], ckpt_path=tmp_path / "a.ckpt")
    assert rest[0] == whole[0]
    assert begun[1] + rest[1] == whole[1]


def test_evaluation_takes_any_loader() -> None:
    loaders = [Handmade(), DataLoader(StatefulStream(), 4), stateful(Numbers(5), 2)]
    model, _ = fit(DataLoader(Numbers(2)), loaders)
    assert [number for number, _ in model.validated] == [0] * 6 + [1] * 6 + [2] * 3


def test_prediction_knows_the_indices_of_its_samples() -> None:
    from trainyard.callbacks import BasePredictionWriter

    class Writer(BasePredictionWriter):
        def write_on_batch_end(
            self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *args: Any
        ) -> None:
            assert batch_indices == prediction
            told.append(batch_indices)

    told: list[Any] = []
    run = trainer(callbacks=[Writer("batch")])
    run.predict(Seen(), DataLoader(Numbers(5), 2))
    assert told == [[0, 1], [2, 3], [4]]
