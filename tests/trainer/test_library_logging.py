"""self.log beyond numbers: metric objects, tensors that change afterwards, compiled modules, and what a resume needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics

import trainyard as L
from tests.trainer.models import Regression, loader, trainer
from trainyard.errors import MisconfigurationException
from trainyard.logged.item import _CHUNK, Item
from trainyard.logged.metrics import Metrics
from trainyard.logged.options import Options


class Measured(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()
        self.errors = torchmetrics.MetricCollection(
            [torchmetrics.MeanAbsoluteError(), torchmetrics.R2Score()], prefix="val_"
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.error(self.net(batch[0]), batch[1])
        self.log("error", self.error, on_step=True, on_epoch=True)
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.errors.update(self.net(batch[0]), batch[1])
        self.log_dict(self.errors)


def test_metric_objects_are_computed_and_reset_at_the_epochs_end() -> None:
    model = Measured()
    fit = trainer(max_epochs=2, num_sanity_val_steps=1)
    fit.fit(model, loader(12, 4), loader(10, 4))
    assert {"error", "error_step", "error_epoch", "val_MeanAbsoluteError", "val_R2Score"} <= set(
        fit.callback_metrics
    )
    inputs, targets = next(iter(loader(10, 10)))
    wanted = torchmetrics.functional.mean_absolute_error(model.net(inputs), targets)
    torch.testing.assert_close(fit.callback_metrics["val_MeanAbsoluteError"], wanted.detach())
    assert model.error._update_count == 0


def test_a_metric_that_is_no_attribute_is_refused() -> None:
    class Loose(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            metric = torchmetrics.MeanMetric()
            metric.update(1.0)
            self.log("loose", metric)
            return self.loss(batch)

    with pytest.raises(MisconfigurationException, match="assign it in __init__"):
        trainer().fit(Loose(), loader())


def test_what_is_logged_is_the_value_of_then() -> None:
    class Counting(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            total = torch.zeros(())
            for _ in range(3):
                total += 1
                self.log("total", total, on_step=False, on_epoch=True)
            return self.loss(batch)

    fit = trainer()
    fit.fit(Counting(), loader(4, 4))
    assert fit.callback_metrics["total"] == 2.0


@pytest.mark.parametrize("reduce", ["mean", "sum", "min", "max", torch.mean, max])
def test_reductions_over_more_values_than_are_kept(reduce: Any) -> None:
    values = torch.randn(2 * _CHUNK + 3, generator=torch.Generator().manual_seed(1))

    class Many(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for value in values:
                self.log("value", value, on_step=False, on_epoch=True, reduce_fx=reduce, batch_size=1)
            return self.loss(batch)

    fit = trainer()
    fit.fit(Many(), loader(4, 4))
    name = reduce if isinstance(reduce, str) else reduce.__name__
    wanted = float(getattr(values.double(), {"min": "amin", "max": "amax"}.get(name, name))())
    assert float(fit.callback_metrics["value"]) == pytest.approx(wanted, rel=1e-5)


def test_the_sums_of_an_epoch_survive_in_the_same_order() -> None:
    options = Options.of(
        "training_step", on_step=False, on_epoch=True, prog_bar=False, logger=True, reduce="mean", sync=False
    )
    values = torch.randn(3 * _CHUNK // 2, generator=torch.Generator().manual_seed(2))
    unbroken, broken = Item(options), Item(options)
    for number, value in enumerate(values):
        unbroken.update("x", value, 3)
        broken.update("x", value, 3)
        if number % 100 == 7:
            broken = Item.from_state(broken.state_dict(), torch.device("cpu"))
    assert broken.sums(torch.device("cpu")) == unbroken.sums(torch.device("cpu"))


def test_metric_objects_survive_in_the_middle_of_an_epoch() -> None:
    saved: list[Any] = []

    class Stopping(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                saved.append(trainer.metrics.state_dict(pl_module))

    model = Measured()
    fit = trainer(callbacks=Stopping(), limit_train_batches=3)
    fit.fit(model, loader(12, 4))
    fresh = Measured()
    metrics = Metrics(fit.strategy, [])
    metrics.load_state_dict(fresh, saved[0])
    assert fresh.error._update_count == 2
    assert fresh.error.total == 8


def test_logging_in_test_hooks_and_where_it_is_refused() -> None:
    class Tested(Regression):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x", 1.0)

        def on_test_epoch_end(self) -> None:
            self.log("end", 2.0)

    found = trainer().test(Tested(), loader(), verbose=False)
    assert found == [{"end": 2.0}]
    with pytest.raises(MisconfigurationException, match="cannot be called from predict_step"):
        trainer().predict(Tested(), loader())


def test_without_a_trainer_a_log_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    class Alone(Regression):
        pass

    model = Alone()
    model.log("x", 1.0)
    model.log("x", 1.0)
    assert [record.message for record in caplog.records] == [
        "self.log in Alone has no effect: it is not attached to a Trainer"
    ]


class Logs(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


@pytest.mark.parametrize("how", ["the module", "a step", "a part"])
def test_compiled_modules_log_outside_of_their_graphs(how: str) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    compiled: list[Any] = []
    plain, model = Logs(), Logs()
    wanted = trainer(log_every_n_steps=1)
    wanted.fit(plain, loader(12, 4))
    given: Any = model
    if how == "the module":
        given = torch.compile(model, backend=backend)
    elif how == "a step":
        model.training_step = torch.compile(model.training_step, backend=backend)  # type: ignore[method-assign]
    else:
        model.net = torch.compile(model.net, backend=backend)  # type: ignore[assignment]
    fit = trainer(log_every_n_steps=1)
    fit.fit(given, loader(12, 4))
    assert compiled, "nothing was compiled"
    torch.testing.assert_close(model.net.weight, plain.net.weight)
    torch.testing.assert_close(fit.callback_metrics["loss_epoch"], wanted.callback_metrics["loss_epoch"])
