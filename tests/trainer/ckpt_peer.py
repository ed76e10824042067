"""One training in two libraries: fits that save and resume, each described by a dict. Run as a program it is Lightning's
side: `ckpt_peer.py JOBS.json` prints a JSON list of what came out."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 5


def make(pl: Any) -> tuple[Any, Any]:
    class Model(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, lr: float = 0.05, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(4)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
            )

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Data(pl.LightningDataModule):  # type: ignore[misc]
        def __init__(self, count: int = 20) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.seen = 0

        def loader(self) -> Any:
            generator = torch.Generator().manual_seed(1)
            inputs = torch.randn(self.hparams.count, 4, generator=generator)
            return DataLoader(
                TensorDataset(inputs, inputs.sum(1, keepdim=True)), self.hparams.count // BATCHES
            )

        def train_dataloader(self) -> Any:
            return self.loader()

        def val_dataloader(self) -> Any:
            return self.loader()

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen + 1}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.seen = state_dict["seen"]

    return Model, Data


def run(library: str, job: dict[str, Any]) -> dict[str, Any]:
    """Job: trainer (arguments), checkpoint (ModelCheckpoint's), resume, save: paths."""
    pl = importlib.import_module(library)
    callbacks = importlib.import_module(f"{library}.callbacks")
    model_class, data_class = make(pl)
    model, data = model_class(), data_class()
    riders = [callbacks.EarlyStopping("val", patience=50)]
    if "checkpoint" in job:
        riders.append(callbacks.ModelCheckpoint(**job["checkpoint"]))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing="checkpoint" in job, callbacks=riders, num_sanity_val_steps=0, **job["trainer"],
    )  # fmt: skip
    if job.get("weights_of"):
        model = model_class.load_from_checkpoint(job["weights_of"], map_location="cpu")
    else:
        trainer.fit(model, datamodule=data, ckpt_path=job.get("resume"))
    if job.get("save"):
        trainer.save_checkpoint(job["save"])
    return {
        "weights": [[float(x).hex() for x in w.flatten()] for w in model.state_dict().values()],
        "step": trainer.global_step, "epoch": trainer.current_epoch, "hparams": dict(model.hparams),
        "seen": data.seen, "best": float(f"{float(riders[0].best_score):.5g}"),
        "rate": [group["lr"] for o in trainer.optimizers for group in o.param_groups],
    }  # fmt: skip


if __name__ == "__main__":
    results = [run("lightning.pytorch", job) for job in json.loads(Path(sys.argv[1]).read_text())]
    print("RESULT", json.dumps(results))
