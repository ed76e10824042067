"""The loop against loops written by hand. The order of the hooks is in test_callbacks_hooks.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import trainyard as L
from tests.trainer.forkhost import PYTHONPATH, ROOT, Host
from tests.trainer.models import Regression, loader, numbers, trainer
from trainyard.data.sampler import permutation
from trainyard.errors import MisconfigurationException


class Whole(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def train_dataloader(self) -> Any:
        return loader(8, 4)

    def val_dataloader(self) -> Any:
        return loader(4, 4)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]


def test_an_exception_reaches_callbacks_and_the_caller() -> None:
    seen: list[BaseException] = []

    class Watcher(L.Callback):
        def on_exception(
            self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
        ) -> None:
            seen.append(exception)

    class Broken(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(callbacks=Watcher()).fit(Broken(), loader())
    assert [str(e) for e in seen] == ["out of luck"]


def test_minus_one_skips_the_rest_of_an_epoch() -> None:
    class Impatient(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

    fit = trainer(max_epochs=3)
    fit.fit(Impatient(), loader())
    assert (fit.global_step, fit.current_epoch) == (3, 3)


def test_the_data_modules_hooks_come_before_the_modules() -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [part * 0 for part in batch]

    model = Regression()
    trainer().fit(model, datamodule=Data())
    assert torch.equal(model.net.weight, Regression().net.weight), "inputs of zero move no weight"
    assert not torch.equal(model.net.bias, Regression().net.bias)


# ---- the same weights as loops written by hand


def by_hand(
    epochs: int, batch_size: int, *, count: int = 12, accumulate: int = 1, clip: float = 0.0, value: bool = False,
    schedule: str = "",
) -> Regression:  # fmt: skip
    model, data = Regression(), numbers(count)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for epoch in range(epochs):
        order = permutation(0, epoch, count, shuffle=True)
        batches = list(order.split(batch_size))
        for first in range(0, len(batches), accumulate):
            window = batches[first : first + accumulate]
            optimizer.zero_grad()
            for part in window:
                loss = model.loss((data.tensors[0][part], data.tensors[1][part]))
                (loss * (len(part) / sum(len(p) for p in window))).backward()
            if clip and value:
                torch.nn.utils.clip_grad_value_(model.parameters(), clip)
            elif clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if schedule == "step":
                scheduler.step()
        if schedule == "epoch":
            scheduler.step()
    return model


class Scheduled(Regression):
    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule}}


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize(
    ("arguments", "hand"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"accumulate_grad_batches": 3}, {"accumulate": 3, "count": 13}),
        ({"gradient_clip_val": 0.5}, {"clip": 0.5}),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {"clip": 0.01, "value": True}),
        (
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
            {"accumulate": 2, "clip": 0.1, "count": 11},
        ),
    ],
)
def test_weights_equal_those_of_a_loop_by_hand(arguments: dict[str, Any], hand: dict[str, Any]) -> None:
    model = Regression()
    trainer(max_epochs=2, **arguments).fit(model, loader(hand.get("count", 12), 2, shuffle=True))
    assert_same(model, by_hand(2, 2, **hand))


@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_schedulers_step_when_they_should(schedule: str) -> None:
    model = Scheduled(schedule)
    trainer(max_epochs=2, accumulate_grad_batches=2).fit(model, loader(12, 2, shuffle=True))
    assert_same(model, by_hand(2, 2, accumulate=2, schedule=schedule))


def test_plateau_scheduler_follows_the_validation_metric() -> None:
    class Plateau(Whole):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", 1.0)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val"}}

    fit = trainer(max_epochs=3)
    fit.fit(Plateau())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


def test_bf16_mixed_computes_in_bfloat16_and_keeps_weights_in_float32() -> None:
    seen: list[torch.dtype] = []

    class Watching(Regression):
        def loss(self, batch: Any) -> torch.Tensor:
            seen.append(self.net(batch[0]).dtype)
            return super().loss(batch)

    model = Watching()
    trainer(precision="bf16-mixed").fit(model, loader())
    assert set(seen) == {torch.bfloat16}
    assert model.net.weight.dtype == torch.float32


DISTRIBUTED = """
import sys, torch
import torch.distributed as dist
from tests.trainer.models import Regression, loader, trainer
model = Regression()
fit = trainer(max_epochs=2, accumulate_grad_batches=int(sys.argv[2]))
fit.fit(model, loader(int(sys.argv[4]), int(sys.argv[3]), shuffle=True))
if fit.is_global_zero:
    torch.save(model.state_dict(), sys.argv[1])
"""


@pytest.mark.parametrize(
    ("world", "count"), [(2, 11), (3, 13)], ids=["uneven tail", "a rank without samples"]
)
def test_ranks_together_do_the_steps_of_one(host: Host, tmp_path: Path, world: int, count: int) -> None:
    """Including the tail, where ranks have unequal shares: 13 = 2 * 6 + 1 leaves two of three ranks without a sample."""
    script, result = tmp_path / "script.py", tmp_path / "weights.pt"
    script.write_text(DISTRIBUTED)
    ranks = host.run([str(script), str(result), "2", "2", str(count)], world=world)
    assert not any(r.code for r in ranks), ranks[0].output
    together = Regression()
    together.load_state_dict(torch.load(result, weights_only=True))
    assert_same(together, by_hand(2, 2 * world, count=count, accumulate=2))


# ---- data


class Indexed(Dataset[torch.Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.cat([torch.tensor([float(index)]), torch.rand(1)])


class Collecting(Regression):
    """Notes the batches; trains on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches.append(batch)
        return self.net.weight.sum() * 0


def collect(data: Any, **kwargs: Any) -> list[torch.Tensor]:
    model = Collecting()
    trainer(**kwargs).fit(model, data)
    return model.batches


def test_each_epoch_has_an_order_of_its_own_and_every_sample_once() -> None:
    rows = torch.cat(collect(DataLoader(Indexed(10), 3, shuffle=True), max_epochs=2))[:, 0].tolist()
    first, second = rows[:10], rows[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert collect(DataLoader(Indexed(4), 4), max_epochs=1)[0][:, 0].tolist() == [0, 1, 2, 3]


def test_random_transforms_in_workers_do_not_depend_on_the_number_of_workers() -> None:
    L.seed_everything(5, verbose=False)
    one = collect(DataLoader(Indexed(12), 3, shuffle=True, num_workers=1), max_epochs=2)
    two = collect(DataLoader(Indexed(12), 3, shuffle=True, num_workers=2), max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert len({row[1].item() for batch in one for row in batch}) == 24, (
        "no two samples get the same random numbers"
    )


def test_loader_workers_outlive_signals_to_the_group() -> None:
    class Signalled(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> torch.Tensor:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            return torch.tensor([index])

    (batch,) = collect(DataLoader(Signalled(), 4, num_workers=1))
    assert batch.flatten().tolist() == [0, 1, 2, 3]


LEFT_BEHIND = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.trainer.models import Regression, loader
from trainyard.data.loader import SampledFeed
from trainyard.data.make import make_feed
feed = make_feed(loader(16, 4, num_workers=1, persistent_workers=True), rank=0, world=1, seed=1)
kept = feed.iterate(0, 0)
next(kept)
sys.modules["kept"] = (feed, kept)
"""


def test_a_script_ends_though_its_loader_workers_were_left_behind(tmp_path: Path) -> None:
    """At its end Python sends its children SIGTERM and waits for them."""
    script = tmp_path / "script.py"
    script.write_text(LEFT_BEHIND)
    env = {**os.environ, "PYTHONPATH": f"{PYTHONPATH}:{ROOT}", "TRAINYARD_GRACE_SECONDS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(ROOT)],
        env=env,
        timeout=90,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_drop_last_and_limits() -> None:
    assert len(collect(DataLoader(Indexed(10), 4, drop_last=True))) == 2
    assert len(collect(DataLoader(Indexed(10), 2), limit_train_batches=3)) == 3
    assert len(collect(DataLoader(Indexed(10), 2), limit_train_batches=0.4)) == 2
    assert len(collect(DataLoader(Indexed(10), 2), max_epochs=-1, max_steps=7)) == 7
    assert len(collect(DataLoader(Indexed(10), 2), fast_dev_run=True)) == 1


def test_an_iterable_dataset_is_used_as_it_is() -> None:
    class Stream(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.arange(6.0).unsqueeze(1))

    rows = torch.cat(collect(DataLoader(Stream(), 4), max_epochs=2))[:, 0].tolist()
    assert rows == [0, 1, 2, 3, 4, 5] * 2


def test_a_sampler_of_ones_own_is_kept_on_one_process() -> None:
    assert torch.cat(collect(DataLoader(Indexed(4), 2, sampler=[3, 1])))[:, 0].tolist() == [3, 1]


# ---- when it stops and validates


def test_validation_comes_as_often_as_asked() -> None:
    class Counting(Whole):
        runs = 0

        def on_validation_start(self) -> None:
            self.runs += 1

        def train_dataloader(self) -> Any:
            return loader(12, 2)

    def runs(**kwargs: Any) -> int:
        model = Counting()
        trainer(max_epochs=4, num_sanity_val_steps=0, **kwargs).fit(model)
        return model.runs

    assert runs() == 4
    assert runs(check_val_every_n_epoch=2) == 2
    assert runs(val_check_interval=0.5) == 8
    assert runs(val_check_interval=2) == 12
    assert runs(limit_val_batches=0) == 0


def test_should_stop_waits_for_the_minimum() -> None:
    class Stopper(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = True

    fit = trainer(max_epochs=10, callbacks=[Stopper()])
    fit.fit(Regression(), loader())
    assert fit.global_step == 1
    fit = trainer(max_epochs=10, min_steps=5, callbacks=[Stopper()])
    fit.fit(Regression(), loader())
    assert fit.global_step == 5


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda o: [o, o], "must give one optimizer"),
        (lambda o: [], "must give one optimizer"),
        (lambda o: {"optimiser": o}, "keys"),
        (lambda o: {"optimizer": o, "lr_scheduler": {"interval": "step"}}, "lr_scheduler"),
        (
            lambda o: {"optimizer": o, "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o)},
            "ReduceLROnPlateau needs",
        ),
    ],
)
def test_configure_optimizers_says_what_it_takes(returned: Any, said: str) -> None:
    class Odd(Regression):
        def configure_optimizers(self) -> Any:
            return returned(super().configure_optimizers())

    with pytest.raises(MisconfigurationException, match=said):
        trainer().fit(Odd(), loader())


def test_without_an_optimizer_nothing_is_learnt_and_all_else_happens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Still(Regression):
        def configure_optimizers(self) -> Any:
            return None

    model, fit = Still(), trainer()
    before = model.net.weight.detach().clone()
    fit.fit(model, loader())
    assert torch.equal(model.net.weight, before)
    assert fit.global_step == 3
    assert "learns nothing" in caplog.text
