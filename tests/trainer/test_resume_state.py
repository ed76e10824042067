"""What a resume brings back besides the weights, in one process over a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer.models import Regression, loader, trainer


class Stop(Exception):
    pass


class CrashAt(L.Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Stop


class Counter(L.Callback):
    """Has state, and sees the hooks."""

    def __init__(self) -> None:
        self.batches = 0
        self.epoch_means: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epoch_means.append(trainer.callback_metrics["loss_epoch"].item())

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "epoch_means": self.epoch_means}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches, self.epoch_means = state_dict["batches"], list(state_dict["epoch_means"])


class Data(L.LightningDataModule):
    def __init__(self) -> None:
        self.served = 0

    def train_dataloader(self) -> Any:
        return loader(20, 4, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.served += 1
        return [part + 0.01 * torch.randn_like(part) for part in batch]

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.served = state_dict["served"]


class Model(Regression):
    def __init__(self, scheduler: str) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.extra = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.extra += 1
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch) + torch.rand(()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.05)
        made = {
            "OneCycleLR": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100),
            "MultiStepLR": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], 0.3),
            "LambdaLR": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n),
            "SequentialLR": lambda: torch.optim.lr_scheduler.SequentialLR(
                optimizer,
                [
                    torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1),
                    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
                ],
                [4],
            ),
            "CosineAnnealingWarmRestarts": lambda: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
                optimizer, 4
            ),
            "ReduceLROnPlateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
        }[self.scheduler]()
        plateau = self.scheduler == "ReduceLROnPlateau"
        config = {"scheduler": made, "interval": "epoch" if plateau else "step", "monitor": "val"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["extra"] = self.extra
        torch.rand(3)  # must not move the generators of the run

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.extra = checkpoint["extra"]


class Run:
    def __init__(self, uri: str, scheduler: str, crash: int | None = None, **kwargs: Any) -> None:
        self.model, self.data, self.counter = Model(scheduler), Data(), Counter()
        self.trainer = trainer(
            max_epochs=4, callbacks=[self.counter, CrashAt(crash)], num_sanity_val_steps=2,
            checkpoint=L.CheckpointConfig(uri=uri, run="run-1", **kwargs),
        )  # fmt: skip
        try:
            self.trainer.fit(self.model, val_dataloaders=loader(8, 4), datamodule=self.data)
            self.crashed = False
        except Stop:
            self.crashed = True

    def state(self) -> tuple[Any, ...]:
        optimizer = self.trainer.optimizers[0].state_dict()
        rates = [group["lr"] for group in optimizer["param_groups"]]
        weights = [w.tolist() for w in self.model.state_dict().values()]
        return (
            weights, rates, self.model.extra, self.data.served, self.counter.batches, self.counter.epoch_means,
            torch.rand(1).item(), self.trainer.global_step, self.trainer.current_epoch,
        )  # fmt: skip


@pytest.mark.parametrize(
    "scheduler",
    [
        "OneCycleLR",
        "MultiStepLR",
        "LambdaLR",
        "SequentialLR",
        "CosineAnnealingWarmRestarts",
        "ReduceLROnPlateau",
    ],
)
@pytest.mark.parametrize(
    "every", [None, 3, 5], ids=["each epoch", "in the middle", "at the last step of an epoch"]
)
def test_everything_is_as_if_nothing_had_happened(tmp_path: Path, scheduler: str, every: int | None) -> None:
    """Optimizer, scheduler, callbacks, data module, module hooks, running means of an epoch, generators."""
    L.seed_everything(7, verbose=False)
    unbroken = Run((tmp_path / "a").as_uri(), scheduler, every_n_steps=every).state()
    uri = (tmp_path / "b").as_uri()
    L.seed_everything(7, verbose=False)
    assert Run(uri, scheduler, crash=9, every_n_steps=every).crashed
    L.seed_everything(123, verbose=False)  # whatever was drawn before must not matter
    assert Run(uri, scheduler, crash=17, every_n_steps=every).crashed
    assert Run(uri, scheduler, every_n_steps=every).state() == unbroken


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    first = Run(tmp_path.as_uri(), "LambdaLR")
    # A save that would overtake another one is left out: their number is not always the same.
    records = len(list(tmp_path.glob("run-1/commits/*")))
    again = Run(tmp_path.as_uri(), "LambdaLR")
    assert again.trainer.global_step == first.trainer.global_step
    assert [w.tolist() for w in again.model.parameters()] == [w.tolist() for w in first.model.parameters()]
    assert len(list(tmp_path.glob("run-1/commits/*"))) == records + 1, "a fence more, no commit more"


def test_a_time_trigger_saves(tmp_path: Path) -> None:
    run = Run(tmp_path.as_uri(), "LambdaLR", every_n_seconds=0.001)
    assert not run.crashed
    assert len(list(tmp_path.glob("run-1/data/*"))) == 3, "keep=3, of more than three"


def test_another_optimizer_is_refused_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(tmp_path.as_uri(), "LambdaLR")

    class Other(Model):
        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()
            del made["lr_scheduler"]
            return made

    with pytest.raises(SystemExit) as info:
        trainer(checkpoint=L.CheckpointConfig(uri=tmp_path.as_uri(), run="run-1")).fit(
            Other("LambdaLR"), loader()
        )
    assert info.value.code == 78
    assert "has 1 scheduler(s), configure_optimizers returned 0" in capsys.readouterr().err
