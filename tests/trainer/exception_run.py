"""A program that raises once: `exception_run.py FOLDER MOMENT RANK STEP [strategy]`.

The exception comes on that rank at that moment of the first step after STEP, if no file says that it has come already. All
that a step may leave behind is there: dropout, batch norm, a scheduler, an accumulation, sums of an epoch, a callback
that counts, noise on the samples.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import trainyard as L

SAMPLES, BATCH, ACCUMULATE, EPOCHS, EVERY = 48, 2, 2, 2, 5


class Moment:
    def __init__(self, marker: Path, name: str, rank: int, step: int) -> None:
        self.marker, self.name, self.rank, self.step = marker, name, rank, step
        self.trainer: Any = None

    def __call__(self, name: str) -> None:
        trainer = self.trainer
        if (
            trainer is None
            or trainer.sanity_checking
            or (name, trainer.global_rank) != (self.name, self.rank)
        ):
            return
        if trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            raise ValueError(f"no luck in {name}")


class Numbers(Dataset[Any]):
    def __init__(self, moment: Moment | None) -> None:
        self.inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))
        self.moment = moment

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        sample = self.inputs[index] + 0.1 * torch.rand(4)
        if self.moment is not None:
            self.moment("loader")
        return sample, sample.sum(0, keepdim=True)


class Adam(torch.optim.Adam):
    moment: Any = None

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.moment("optimizer")
        return loss


class Module(L.LightningModule):
    def __init__(self, moment: Moment) -> None:
        super().__init__()
        self.moment = moment
        wide = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2)
        self.net = torch.nn.Sequential(*wide, torch.nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        if batch_idx % ACCUMULATE == 0:
            self.moment("training_step")
        else:
            self.moment("in the middle of an accumulation")
        return loss

    def on_after_backward(self) -> None:
        self.moment("on_after_backward")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("noise", torch.rand(()) + self.net(batch[0]).mean().detach(), sync_dist=True)
        if batch_idx == 1:
            self.moment("validation_step")

    def on_train_epoch_end(self) -> None:
        self.log("epochs_loss", self.trainer.callback_metrics["loss_epoch"])

    def configure_optimizers(self) -> Any:
        optimizer = Adam(self.parameters(), 0.01)
        optimizer.moment = self.moment
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Counter(L.Callback):
    """Counts what it sees, and sets the optimizer, in the middle of a step that may fail."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.seen: dict[str, Any] = {"batches": 0, "sum": torch.zeros(())}
        self.validations = 0

    def state_dict(self) -> dict[str, Any]:
        return {**self.seen, "validations": self.validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validations = state.pop("validations")
        self.seen = state

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.moment("on_train_epoch_start")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen["batches"] += 1
        self.seen["sum"].add_(batch[0].mean())
        trainer.optimizers[0].param_groups[0]["weight_decay"] += 1e-3
        self.moment("on_train_batch_start")

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.moment("on_train_batch_end")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.validations += not trainer.sanity_checking


def main() -> None:
    folder, name, rank, step, *strategy = sys.argv[1:]
    moment = Moment(Path(folder, "it came"), name, int(rank), int(step))
    L.seed_everything(1, verbose=False)
    module, counter = Module(moment), Counter(moment)
    trainer = L.Trainer(
        accelerator="cpu", strategy=strategy[0] if strategy else "auto", max_epochs=EPOCHS, callbacks=[counter],
        accumulate_grad_batches=ACCUMULATE, logger=False, enable_progress_bar=False, enable_model_summary=False,
        val_check_interval=4, limit_val_batches=3,
        checkpoint=L.CheckpointConfig(
            uri=Path(folder, "runs").as_uri(), every_n_steps=EVERY, run="r", on_exception="EXCEPTION" in os.environ, keep=20,
            attempt=int(os.environ["TRAINYARD_ATTEMPT"]),
        ),
    )  # fmt: skip
    moment.trainer = trainer
    trainer.fit(module, DataLoader(Numbers(moment), BATCH, shuffle=True), DataLoader(Numbers(None), BATCH))
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    # A callback's state is rank 0's on all ranks after a resume.
    seen = [
        counter.seen["batches"],
        float(counter.seen["sum"]) if trainer.is_global_zero else "",
        counter.validations,
    ]
    last = {k: float(v) for k, v in sorted(trainer.callback_metrics.items())}
    print(f"END {digest.hexdigest()} {torch.rand(()).item()} {seen} {last}", flush=True)


if __name__ == "__main__":
    main()
