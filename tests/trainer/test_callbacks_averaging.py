"""WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.callback_runs import Broken, Scored, run, same, weights
from tests.trainer.forkhost import Host
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from trainyard.errors import MisconfigurationException


class Counting(Regression):
    """Its one weight is the number of its steps: gradient -1, rate 1. Keeps what it was validated with."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.net.weight)
        self.validated: list[float] = []

    @property
    def value(self) -> float:
        return float(self.net.weight.detach())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return -self.net.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.value)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1.0)


class AtEnd(Callback):
    """The weight when an epoch is trained."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(pl_module.value)


def fitted(callback: Callback, epochs: int = 2, **kwargs: Any) -> tuple[Counting, list[float]]:
    """2 batches an epoch, 1 of validation."""
    module, at_end = Counting(), AtEnd()
    fit = trainer(callbacks=[callback, at_end], max_epochs=epochs, **{"num_sanity_val_steps": 0} | kwargs)
    fit.fit(module, loader(8), loader(4))
    return module, at_end.values


def test_the_equal_average_of_all_steps() -> None:
    module, trained = fitted(WeightAveraging())
    assert module.value == (1 + 2 + 3 + 4) / 4
    assert module.validated == [(1 + 2) / 2, (1 + 2 + 3 + 4) / 4]
    assert trained == [2.0, 4.0]


def test_before_the_first_update_all_is_as_without() -> None:
    module, _ = fitted(WeightAveraging(), num_sanity_val_steps=1)
    assert module.validated[0] == 0.0

    class Never(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return False

    module, _ = fitted(Never())
    assert module.value == 4.0
    assert module.validated == [2.0, 4.0]


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ({"decay": 0.5}, [1, 1.5, 2.25, 3.125]),
        ({"decay": 0.5, "update_every_n_steps": 2}, [1, 1, 2, 2]),
        ({"decay": 0.5, "update_starting_at_step": 2}, [None, None, 3, 3.5]),
        ({"decay": 0.5, "update_every_n_steps": 0, "update_starting_at_epoch": 1}, [None, None, None, 4]),
    ],
)
def test_the_exponential_average(arguments: dict[str, Any], values: list[float | None]) -> None:
    module, _ = fitted(EMAWeightAveraging(**arguments))
    seen = [2.0 if values[1] is None else values[1], values[3]]
    assert module.validated == seen
    assert module.value == values[3]


def test_a_device_and_a_function_of_ones_own() -> None:
    module, _ = fitted(
        WeightAveraging(device="cpu", avg_fn=lambda average, new, count: torch.maximum(average, new))
    )
    assert module.value == 4.0


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(MisconfigurationException, match="decay=2"):
        EMAWeightAveraging(decay=2)
    with pytest.raises(MisconfigurationException, match="update_every_n_steps=-1"):
        EMAWeightAveraging(update_every_n_steps=-1)


# ---- checkpoints


def test_files_have_the_average_and_the_trained_weights(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path)
    module, at_end = Counting(), AtEnd()
    callbacks: list[Callback] = [EMAWeightAveraging(decay=0.5), at_end, checkpoint]
    trainer(callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0, max_epochs=2).fit(
        module, loader(8), loader(4)
    )
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert float(saved["state_dict"]["net.weight"]) == 3.125
    assert float(saved["current_model_state"]["net.weight"]) == 4.0
    assert int(saved["averaging_state"]["n_averaged"]) == 4
    other = Counting()
    trainer().validate(other, loader(4), ckpt_path=checkpoint.best_model_path, verbose=False)
    assert other.validated == [3.125]


def test_a_fit_goes_on_from_the_file(tmp_path: Path) -> None:
    fit = trainer(callbacks=EMAWeightAveraging(decay=0.5), max_epochs=1)
    fit.fit(Counting(), loader(8))
    whole, _ = fitted(EMAWeightAveraging(decay=0.5), epochs=2)

    first = ModelCheckpoint(dirpath=tmp_path)
    trainer(callbacks=[EMAWeightAveraging(decay=0.5), first], enable_checkpointing=True).fit(
        Counting(), loader(8)
    )
    module = Counting()
    trainer(callbacks=EMAWeightAveraging(decay=0.5), max_epochs=2).fit(
        module, loader(8), ckpt_path=first.best_model_path
    )
    assert module.value == whole.value == 3.125


AVERAGING: dict[str, Callable[[], Callback]] = {
    "every step": WeightAveraging,
    "exponential": lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=3),
    "from an epoch on": lambda: EMAWeightAveraging(
        decay=0.9, update_every_n_steps=0, update_starting_at_epoch=1
    ),
    "trained weights only": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "stochastic": lambda: StochasticWeightAveraging(0.05, 0.5, annealing_epochs=2),
}


@pytest.mark.parametrize("make", AVERAGING.values(), ids=AVERAGING.keys())
def test_a_broken_run_ends_with_the_same_average(tmp_path: Path, make: Callable[[], Callback]) -> None:
    def callbacks(folder: Path) -> list[Callback]:
        return [make()]

    _, net, _ = run(tmp_path / "unbroken", callbacks, epochs=4)
    for stop in range(2, 16, 3):
        folder = tmp_path / str(stop)
        run(folder, callbacks, stop_at=stop, epochs=4, every=2)
        _, resumed, _ = run(folder, callbacks, epochs=4, every=2)
        assert same(weights(resumed), weights(net)), stop


def test_broken_off_in_validation_the_trained_weights_are_saved(tmp_path: Path) -> None:
    """While the average is in their place."""

    class Broke(EMAWeightAveraging):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            raise Broken

    module = Counting()
    fit = trainer(callbacks=Broke(decay=0.5), num_sanity_val_steps=0)
    with pytest.raises(Broken):
        fit.fit(module, loader(8), loader(4))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert float(saved["state_dict"]["net.weight"]) == 1.5
    assert float(saved["current_model_state"]["net.weight"]) == 2.0
    assert module.value == 2.0


# ---- stochastic weight averaging


@pytest.mark.parametrize(("start", "value"), [(0.5, (4 + 6 + 8) / 3), (1, (2 + 4 + 6 + 8) / 4), (4, 8.0)])
def test_the_average_over_the_ends_of_the_last_epochs(start: float, value: float) -> None:
    """Lightning takes the weights at the starts of those epochs, so that the last one counts for nothing."""
    swa = StochasticWeightAveraging(swa_lrs=1.0, swa_epoch_start=start)
    module, trained = fitted(swa, epochs=4)
    assert trained == [2.0, 4.0, 6.0, 8.0]
    assert module.value == value
    assert swa.swa_end == 3


def test_rates_go_to_those_of_the_average() -> None:
    rates: list[float] = []

    class Watching(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    swa = StochasticWeightAveraging(0.2, swa_epoch_start=2, annealing_epochs=2, annealing_strategy="linear")
    trainer(callbacks=[swa, Watching()], max_epochs=5).fit(Counting(), loader(8))
    assert rates == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.2])


def test_normalisation_gets_its_statistics_from_the_training_data() -> None:
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=0.5)
    module = Scored()
    data = loader(32, 8)
    trainer(callbacks=swa, max_epochs=3).fit(module, data)
    inputs = torch.stack([batch[0] for batch in data])
    assert torch.allclose(module.norm.running_mean, inputs.mean((0, 1)), atol=1e-6)
    assert torch.allclose(module.norm.running_var, inputs.var(1).mean(0), atol=1e-6)
    assert int(module.norm.num_batches_tracked) == 4
    assert module.norm.momentum == 0.1


@pytest.mark.parametrize(
    "arguments",
    [
        {"swa_lrs": 0}, {"swa_lrs": []}, {"swa_lrs": [0.1, "a"]}, {"swa_lrs": 1.0, "swa_epoch_start": 0},
        {"swa_lrs": 1.0, "swa_epoch_start": 1.5}, {"swa_lrs": 1.0, "annealing_epochs": -1},
        {"swa_lrs": 1.0, "annealing_strategy": "x"},
    ],
)  # fmt: skip
def test_swa_arguments_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging"):
        StochasticWeightAveraging(**arguments)


def test_where_swa_has_no_last_epochs() -> None:
    fit = trainer(callbacks=StochasticWeightAveraging(1.0), max_epochs=-1, max_steps=2)
    with pytest.raises(MisconfigurationException, match="max_epochs"):
        fit.fit(Counting(), loader(8))


# ---- several processes

RANKS = """
import torch
from tests.trainer.callback_runs import Scored
from tests.trainer.models import loader, trainer
from trainyard.callbacks import EMAWeightAveraging, StochasticWeightAveraging

class Validated(Scored):
    def on_validation_epoch_start(self):
        print("RESULT", [t.tolist() for t in self.state_dict().values()])

for callback in (EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(0.01, 0.5)):
    torch.manual_seed(3)
    exponential = isinstance(callback, EMAWeightAveraging)
    module = Validated() if exponential else Scored()
    fit = trainer(callbacks=callback, max_epochs=2, strategy="ddp", num_sanity_val_steps=0)
    fit.fit(module, loader(32, 4), loader(8, 4))
    tensors = module.state_dict().values() if exponential else module.parameters()
    print("RESULT", [t.tolist() for t in tensors])
"""


def test_all_ranks_have_the_same_average(host: Host, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    ranks = host.run([str(script)], world=2)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output[-3000:]
    one, other = ([t for t in r.output.splitlines() if t.startswith("RESULT")] for r in ranks)
    assert one == other
    assert len(one) == 4
