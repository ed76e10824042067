"""Whatever the loader is: broken off and gone on from a checkpoint, a run has the same weights and metrics, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import trainyard as L
from tests.trainer.loaders import LOADERS, WITH_WORKERS, Drawing, Numbers
from tests.trainer.models import trainer
from trainyard.data.once import _said


class Stop(Exception):
    pass


class Breaks(L.Callback):
    """Saves after the batch `save`, counted from the beginning of the run, and fails after the batch `stop`."""

    def __init__(self, path: Path, save: int | None, stop: int | None) -> None:
        self.path, self.save, self.stop = path, save, stop

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        done = trainer.loop_state.total_batches
        if done == self.save:
            trainer.save_checkpoint(self.path)
        if done == self.stop:
            raise Stop


class Model(L.LightningModule):
    """Sums over whatever the batch consists of, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        generator = torch.Generator().manual_seed(3)
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        self.seen: list[Any] = []
        self.means: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append((self.current_epoch, batch_idx, _labels(batch)))
        loss = sum((self.net(data) ** 2).mean() for data in _data(batch))
        self.log("loss", loss, on_epoch=True, batch_size=1)
        return loss

    def on_train_epoch_end(self) -> None:
        self.means.append(self.trainer.callback_metrics["loss_epoch"].item())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def _leaves(batch: Any) -> list[Any]:
    """The (labels, data) pairs."""
    if isinstance(batch, dict):
        return [leaf for value in batch.values() for leaf in _leaves(value)]
    if isinstance(batch, list | tuple) and not isinstance(batch[-1], torch.Tensor):
        return [leaf for value in batch for leaf in _leaves(value)]
    return [] if batch is None else [batch]


def _labels(batch: Any) -> list[Any]:
    return [torch.as_tensor(labels).tolist() for labels, _ in _leaves(batch)]


def _data(batch: Any) -> list[torch.Tensor]:
    return [data for _, data in _leaves(batch)]


class Run:
    def __init__(
        self, make: Callable[[], Any], path: Path, *, seed: int = 7, save: int | None = None, stop: int | None = None,
        resume: Path | None = None, accumulate: int = 1, **options: Any,
    ) -> None:  # fmt: skip
        L.seed_everything(seed, verbose=False)
        self.model = Model()
        self.trainer = trainer(
            max_epochs=3, callbacks=[Breaks(path, save, stop)], accumulate_grad_batches=accumulate, **options
        )
        try:
            self.trainer.fit(self.model, make(), ckpt_path=resume)
        except Stop:
            assert stop is not None
        weights = [w.tolist() for w in self.model.state_dict().values()]
        self.result = weights, torch.rand(1).item(), self.trainer.global_step

    @property
    def per_epoch(self) -> int:
        return sum(epoch == 0 for epoch, _, _ in self.model.seen)


def broken(make: Callable[[], Any], path: Path, save: int, accumulate: int, **options: Any) -> Run:
    """A run that is broken off one batch after the save, and gone on with; `seen` is of both."""
    first = Run(make, path, save=save, stop=save + 1, accumulate=accumulate, **options)
    assert path.exists()
    then = Run(make, path, seed=99, resume=path, accumulate=accumulate, **options)
    then.model.seen = first.model.seen[:save] + then.model.seen
    return then


def check(
    make: Callable[[], Any],
    tmp_path: Path,
    saves: Callable[[int], list[int]],
    accumulate: int,
    **options: Any,
) -> None:
    whole = Run(make, tmp_path / "none.ckpt", accumulate=accumulate, **options)
    for save in saves(whole.per_epoch):
        resumed = broken(make, tmp_path / f"{save}.ckpt", save, accumulate, **options)
        assert resumed.model.seen == whole.model.seen, f"saved after batch {save}"
        assert resumed.result == whole.result, f"saved after batch {save}"
        assert resumed.model.means == whole.model.means[-len(resumed.model.means) :]


@pytest.mark.parametrize("name", LOADERS)
def test_in_the_middle_of_an_epoch(name: str, tmp_path: Path) -> None:
    check(LOADERS[name], tmp_path, lambda epoch: [epoch, epoch + 3], 1)


@pytest.mark.parametrize("name", LOADERS)
def test_in_the_middle_of_an_accumulation(name: str, tmp_path: Path) -> None:
    """Saved when the optimizer has stepped, broken off with gradients waiting."""
    check(LOADERS[name], tmp_path, lambda epoch: [epoch + 2], 2)


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_with_workers(name: str, tmp_path: Path) -> None:
    check(WITH_WORKERS[name], tmp_path, lambda epoch: [epoch + 2], 2)


# ---- what makes it exact, by taking it away


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("sampler with generators", "loader.SampledFeed.load_state"),
        ("counting sampler", "loader.SampledFeed.load_state"),
        ("with a generator", "loader.SampledFeed.load_state"),
        ("dataset with a generator", "loader.SampledFeed.load_state"),
        ("iterable with state", "stream.StreamFeed.load_state"),
        ("handmade with state", "stream.StreamFeed.load_state"),
        ("max_size_cycle", "combined.CombinedFeed.load_state"),
    ],
)
def test_without_the_state_of_the_loader_it_would_differ(
    name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run(LOADERS[name], tmp_path / "none.ckpt")
    monkeypatch.setattr(f"trainyard.data.{part}", lambda self, state, *, moved=False: None)
    resumed = broken(LOADERS[name], tmp_path / "some.ckpt", whole.per_epoch + 3, 1)
    assert resumed.result[0] != whole.result[0]


def test_without_the_generators_it_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(LOADERS["shuffle"], tmp_path / "none.ckpt")
    monkeypatch.setattr("trainyard.trainer.restoring.set_rng_state", lambda state: None)
    resumed = broken(LOADERS["shuffle"], tmp_path / "some.ckpt", 3, 1)
    assert resumed.result[0] != whole.result[0]


# ---- where it cannot be exact, it says so


class Forgetful(Drawing):
    """Its order comes from the operating system."""

    def __iter__(self) -> Any:
        yield from random.SystemRandom().sample(range(len(self)), len(self))


def said(make: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of a resume, and of another one in the same process."""
    _said.clear()
    for name in ("a", "b"):
        broken(make, tmp_path / name, 2, 1)
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name == "trainyard"]


def test_a_sampler_that_gives_another_order_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (warning,) = said(lambda: DataLoader(Numbers(), 4, sampler=Forgetful()), tmp_path, caplog)
    assert "Forgetful: the sampler gave another order" in warning
    assert "not exact" in warning


@pytest.mark.parametrize("name", ["iterable", "handmade", "iterable, workers"])
def test_reading_again_is_said_once(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (warning,) = said((LOADERS | WITH_WORKERS)[name], tmp_path, caplog)
    assert "no state_dict, so the 2 batches before the checkpoint's position are read again" in warning
    assert "exact only if" in warning


@pytest.mark.parametrize("name", ["shuffle", "drawing sampler", "max_size_cycle", "handmade with state"])
def test_nothing_is_said_of_what_is_exact(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert said(LOADERS[name], tmp_path, caplog) == []


def test_another_number_of_workers_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _said.clear()
    Run(LOADERS["iterable with state"], tmp_path / "a", save=2, stop=3)
    Run(WITH_WORKERS["iterable with state, workers"], tmp_path / "none", resume=tmp_path / "a")
    assert any("DataLoader workers is another one" in r.getMessage() for r in caplog.records)
