"""The learning rate range test: what it finds, and that nothing of it remains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks.base import Callback
from trainyard.callbacks.lr_finder import LearningRateFinder
from trainyard.errors import MisconfigurationException
from trainyard.loggers import CSVLogger
from trainyard.tuner import Tuner
from trainyard.tuner.lr_finder import LRFinder


class Net(Regression):
    """With everything that a sweep could leave traces in: momentum, dropout, running statistics, a scheduler."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.norm = torch.nn.BatchNorm1d(4)
        self.drop = torch.nn.Dropout(0.2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        loss = torch.nn.functional.mse_loss(self.net(self.drop(self.norm(inputs))), targets)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Counter(Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


def data(**kwargs: Any) -> Any:
    return loader(24, shuffle=True, **kwargs)


def fitted(net: Net, own: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
    L.seed_everything(5, verbose=False)
    trainer(max_epochs=2, **kwargs).fit(net, own or data(), loader(8))
    return net.state_dict()


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_learning_rate_grows_from_the_least_to_the_greatest() -> None:
    exponential, linear = LRFinder("exponential", 1e-4, 1.0, 5), LRFinder("linear", 0.5, 1.5, 5)
    assert [exponential.lr_at(i) for i in range(5)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert [linear.lr_at(i) for i in range(5)] == pytest.approx([0.5, 0.75, 1.0, 1.25, 1.5])


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    finder = LRFinder("exponential", 1e-4, 1.0, 9)
    finder.results = {
        "lr": [finder.lr_at(i) for i in range(9)],
        "loss": [9.0, 1.0, 1.0, 0.99, 0.9, 0.5, 0.45, float("nan"), 7.0],
    }
    assert finder.suggestion(skip_begin=1, skip_end=1) == pytest.approx(finder.lr_at(4))
    assert finder.suggestion(skip_begin=8, skip_end=1) is None
    figure = finder.plot(suggest=True)
    assert figure is not None


def test_a_sweep_leaves_nothing_behind(tmp_path: Path) -> None:
    plain = fitted(Net())

    net, counter, logger = Net(), Counter(), CSVLogger(tmp_path)
    L.seed_everything(5, verbose=False)
    shuffled = data(generator=torch.Generator().manual_seed(1))
    own_order = shuffled.generator.get_state()
    tuned = trainer(max_epochs=2, callbacks=[counter], logger=logger)
    before, random = net.state_dict(), torch.get_rng_state()
    before = {name: value.clone() for name, value in before.items()}
    finder = Tuner(tuned).lr_find(
        net, shuffled, update_attr=False, num_training=20, early_stop_threshold=None
    )
    assert finder is not None and len(finder.results["loss"]) == 20
    assert equal(net.state_dict(), before)
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(shuffled.generator.get_state(), own_order)
    assert (counter.batches, tuned.global_step, tuned.callbacks[-1].__class__) == (0, 0, Counter)
    assert not list(tmp_path.rglob("metrics.csv"))
    tuned.fit(net, data(), loader(8))
    assert equal(net.state_dict(), plain)
    assert counter.batches == 12


def test_the_callback_sweeps_within_a_fit_and_the_fit_is_as_without() -> None:
    kept = Net()
    finder = LearningRateFinder(num_training_steps=15, update_attr=False, early_stop_threshold=None)
    assert equal(fitted(kept, callbacks=[finder]), fitted(Net()))
    assert finder.optimal_lr is not None and len(finder.optimal_lr.results["lr"]) == 15


def test_a_fit_goes_on_with_what_was_found_as_if_it_had_known() -> None:
    swept = Net(lr=123.0)
    finder = LearningRateFinder(1e-3, 0.5, num_training_steps=25)
    weights = fitted(swept, callbacks=[finder])
    assert swept.lr != 123.0 and finder.state_dict() == {"lr": swept.lr}
    assert equal(weights, fitted(Net(lr=swept.lr)))


def test_an_optimizer_that_has_learnt_already_is_put_back(tmp_path: Path) -> None:
    """A search in the middle of a run: Adam's moments, steps and the scheduler's base are those of before."""

    class Later(LearningRateFinder):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None: ...

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.search(trainer, pl_module)

    class Adam(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), self.lr)

    found = Later(num_training_steps=12, update_attr=False)
    assert equal(fitted(Adam(), callbacks=[found]), fitted(Adam()))
    assert found.optimal_lr is not None


def test_a_sweep_ends_early_once_the_loss_has_blown_up() -> None:
    net = Net()
    finder = Tuner(trainer()).lr_find(net, data(), min_lr=1e-3, max_lr=1e6, num_training=60)
    assert finder is not None
    losses = finder.results["loss"]
    assert len(losses) < 60
    assert losses[-1] > 4 * min(losses[:-1]) or losses[-1] != losses[-1]
    assert net.lr == finder.suggestion()


def test_the_result_goes_to_where_the_learning_rate_lives() -> None:
    class Kept(Net):
        def __init__(self, learning_rate: float = 1.0) -> None:
            super().__init__()
            self.save_hyperparameters()
            del self.lr

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.hparams.learning_rate)

    net = Kept()
    finder = Tuner(trainer()).lr_find(net, data(), num_training=30, mode="linear", min_lr=1e-4, max_lr=0.1)
    assert finder is not None and net.hparams.learning_rate == finder.suggestion()
    with pytest.raises(MisconfigurationException, match="no speed, neither as an attribute nor in hparams"):
        Tuner(trainer()).lr_find(net, data(), attr_name="speed")


def test_accumulated_batches_make_one_point() -> None:
    finder = Tuner(trainer(accumulate_grad_batches=3)).lr_find(
        Net(), data(), num_training=7, early_stop_threshold=None, update_attr=False
    )
    assert finder is not None and len(finder.results["lr"]) == 7
    assert finder.results["lr"] == pytest.approx([finder.lr_at(i) for i in range(7)])


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    finder = Tuner(trainer()).lr_find(Net(), data(), num_training=30)
    assert finder is not None
    figure = finder.plot(suggest=True)
    path = tmp_path / "lr.png"
    figure.savefig(path)  # type: ignore[union-attr]
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]  # type: ignore[union-attr]
    assert axes.get_xscale() == "log"
    assert list(axes.lines[1].get_xydata()[:, 0]) == [finder.suggestion()]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "cubic"}, "mode: 'cubic'"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr"),
        ({"num_training": 1}, "num_training"),
        ({"method": "test"}, "method: 'test'"),
        ({"dataloaders": []}, "dataloaders"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Tuner(trainer()).lr_find(Net(), data(), **wrong)


def test_several_optimizers_are_refused_and_all_is_as_before() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    tuned = trainer()
    before = dict(vars(tuned))
    with pytest.raises(MisconfigurationException, match="automatic optimization"):
        Tuner(tuned).lr_find(Manual(), data())
    after = dict(vars(tuned))
    assert {k: v for k, v in after.items() if k not in ("_module", "datamodule")} == {
        k: v for k, v in before.items() if k not in ("_module", "datamodule")
    }


def test_nothing_is_searched_in_a_fast_dev_run() -> None:
    net = Net()
    assert Tuner(trainer(fast_dev_run=True)).lr_find(net, data()) is None
    assert net.lr == 0.05


def test_a_resumed_fit_keeps_what_it_had_found(tmp_path: Path) -> None:
    def run(max_epochs: int, ckpt: Path | None = None) -> tuple[Any, Net, LearningRateFinder]:
        L.seed_everything(5, verbose=False)
        net, finder = Net(), LearningRateFinder(1e-3, 0.5, num_training_steps=25)
        fit = trainer(max_epochs=max_epochs, callbacks=[finder])
        fit.fit(net, data(), loader(8), ckpt_path=ckpt)
        return fit, net, finder

    _, whole, first = run(3)
    half, *_ = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, again = run(3, tmp_path / "half.ckpt")
    assert equal(resumed.state_dict(), whole.state_dict())
    assert (resumed.lr, again.optimal_lr) == (whole.lr, None)
    assert first.optimal_lr is not None
