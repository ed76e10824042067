"""LearningRateMonitor and GradientAccumulationScheduler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from tests.trainer.callback_runs import Scored, run, same, weights
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks import Callback, GradientAccumulationScheduler, LearningRateMonitor
from trainyard.errors import MisconfigurationException
from trainyard.loggers.base import Logger

# ---- learning rates


class Rows(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


class Configured(Regression):
    """With optimizers by a function of it."""

    def __init__(self, make: Callable[[Any], Any], *, automatic: bool = True) -> None:
        super().__init__()
        self.make, self.automatic_optimization = make, automatic

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return self.make(self)


def rows(
    make: Callable[[Any], Any], monitor: LearningRateMonitor, *, automatic: bool = True, **kwargs: Any
) -> Any:
    """2 epochs of 2 batches."""
    logger = Rows()
    fit = trainer(callbacks=monitor, logger=logger, log_every_n_steps=1, **{"max_epochs": 2} | kwargs)
    fit.fit(Configured(make, automatic=automatic), loader(8))
    return logger.rows


def scheduled(optimizer: Any, **config: Any) -> Any:
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), **config}}


def groups(module: Any, *names: str) -> list[dict[str, Any]]:
    found = [{"params": [module.net.weight], "lr": 0.1}, {"params": [module.net.bias], "lr": 0.2}]
    return [{**group, "name": name} for group, name in zip(found, names, strict=True)] if names else found


@pytest.mark.parametrize(
    ("make", "arguments", "expected"),
    [
        (lambda m: SGD(m.parameters(), 0.1), {}, [(step, {"lr-SGD": 0.1}) for step in range(4)]),
        (lambda m: scheduled(SGD(m.parameters(), 0.1)), {}, [(0, {"lr-SGD": 0.1}), (2, {"lr-SGD": 0.05})]),
        (
            lambda m: scheduled(SGD(m.parameters(), 0.4), interval="step"), {},
            [(0, {"lr-SGD": 0.4}), (1, {"lr-SGD": 0.2}), (2, {"lr-SGD": 0.1}), (3, {"lr-SGD": 0.05})],
        ),
        (
            lambda m: scheduled(SGD(m.parameters(), 0.4), interval="step"), {"logging_interval": "epoch"},
            [(0, {"lr-SGD": 0.4}), (2, {"lr-SGD": 0.1})],
        ),
        (
            lambda m: scheduled(SGD(m.parameters(), 0.2, momentum=0.9, weight_decay=0.5), name="mine"),
            {"log_momentum": True, "log_weight_decay": True},
            [
                (0, {"mine": 0.2, "mine-momentum": 0.9, "mine-weight_decay": 0.5}),
                (2, {"mine": 0.1, "mine-momentum": 0.9, "mine-weight_decay": 0.5}),
            ],
        ),
        (
            lambda m: scheduled(Adam(groups(m))), {"log_momentum": True},
            [
                (0, {"lr-Adam/pg1": 0.1, "lr-Adam/pg1-momentum": 0.9, "lr-Adam/pg2": 0.2, "lr-Adam/pg2-momentum": 0.9}),
                (2, {"lr-Adam/pg1": 0.05, "lr-Adam/pg1-momentum": 0.9, "lr-Adam/pg2": 0.1, "lr-Adam/pg2-momentum": 0.9}),
            ],
        ),
        (
            lambda m: scheduled(SGD(groups(m, "w", "b"))), {"log_key_prefix": "opt/"},
            [(0, {"opt/lr-SGD/w": 0.1, "opt/lr-SGD/b": 0.2}), (2, {"opt/lr-SGD/w": 0.05, "opt/lr-SGD/b": 0.1})],
        ),
    ],
    ids=["no scheduler", "epoch", "step", "step, by epoch", "named", "groups", "named groups, prefix"],
)  # fmt: skip
def test_rates_are_logged(make: Any, arguments: dict[str, Any], expected: list[Any]) -> None:
    """As Lightning 2.6.6 logs them, but once for a step."""
    assert rows(make, LearningRateMonitor(**arguments)) == expected


def test_several_optimizers_of_a_kind() -> None:
    def make(module: Any) -> Any:
        return [SGD([module.net.weight], 0.1), SGD([module.net.bias], 0.2), Adam([module.net.bias])]

    found = rows(make, LearningRateMonitor(), automatic=False, max_epochs=1)
    assert found[0] == (0, {"lr-SGD": 0.1, "lr-SGD-1": 0.2, "lr-Adam": 0.001})


def test_rates_can_be_watched() -> None:
    monitor = LearningRateMonitor("step", log_momentum=True)
    fit = trainer(callbacks=monitor, logger=Rows(), log_every_n_steps=2)
    fit.fit(Configured(lambda m: SGD(m.parameters(), 0.5, momentum=0.8)), loader(16))
    assert fit.callback_metrics["lr-SGD"] == 0.5
    assert monitor.lrs == {"lr-SGD": [0.5, 0.5]}
    assert monitor.last_momentum_values == {"lr-SGD-momentum": 0.8}


def test_what_it_cannot_do() -> None:
    with pytest.raises(MisconfigurationException, match="logging_interval='week'"):
        LearningRateMonitor("week")
    with pytest.raises(MisconfigurationException, match="needs a logger"):
        trainer(callbacks=LearningRateMonitor()).fit(Regression(), loader())
    with pytest.raises(MisconfigurationException, match="the same name"):
        rows(lambda m: SGD(groups(m, "w", "w")), LearningRateMonitor())


# ---- accumulation


class Steps(Callback):
    """Optimizer steps at the end of each epoch, and the factor in it."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.found.append((trainer.accumulate_grad_batches, trainer.global_step))


def test_batches_for_a_step_by_epoch() -> None:
    steps = Steps()
    scheduler = GradientAccumulationScheduler({1: 4, 3: 3})
    fit = trainer(callbacks=[scheduler, steps], max_epochs=5)
    fit.fit(Regression(), loader(32, 4))
    assert steps.found == [(1, 8), (4, 10), (4, 12), (3, 15), (3, 18)]
    assert scheduler.going_to_accumulate_grad_batches()


def test_the_gradient_is_that_of_all_batches_of_the_step() -> None:
    by_schedule, by_argument = Regression(), Regression()
    trainer(callbacks=GradientAccumulationScheduler({0: 2})).fit(by_schedule, loader(16, 4))
    trainer(accumulate_grad_batches=2).fit(by_argument, loader(16, 4))
    assert same(weights(by_schedule), weights(by_argument))


def test_a_broken_run_steps_as_an_unbroken_one(tmp_path: Path) -> None:
    def make(folder: Path) -> list[Callback]:
        return [GradientAccumulationScheduler({1: 2, 2: 3})]

    whole, net, _ = run(tmp_path / "unbroken", make, epochs=4)
    assert whole.global_step == 4 + 2 + 2 + 2
    for stop in range(2, 16, 3):
        run(tmp_path / str(stop), make, stop_at=stop, epochs=4)
        again, resumed, _ = run(tmp_path / str(stop), make, epochs=4)
        assert again.global_step == whole.global_step, stop
        assert same(weights(resumed), weights(net)), stop


@pytest.mark.parametrize("scheduling", [{-1: 2}, {"a": 2}, {0: 0}, {0: 1.5}])
def test_schedules_that_make_no_sense(scheduling: Any) -> None:
    with pytest.raises(MisconfigurationException, match="GradientAccumulationScheduler"):
        GradientAccumulationScheduler(scheduling)
    with pytest.raises(TypeError, match="scheduling"):
        GradientAccumulationScheduler({})


def test_where_somebody_else_decides() -> None:
    scheduler = GradientAccumulationScheduler({0: 2})
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        trainer(callbacks=scheduler).fit(
            Configured(lambda m: [SGD(m.parameters(), 0.1)], automatic=False), loader()
        )
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=5"):
        trainer(callbacks=scheduler, accumulate_grad_batches=5).fit(Regression(), loader())


def test_scored_is_random() -> None:
    """The comparisons of broken runs could not fail with a model that draws nothing."""
    batch = next(iter(loader(8, 8)))
    module = Scored()
    assert not torch.equal(module.loss(batch), module.loss(batch))
