"""A program that trains on one of the loaders of `loaders.py`: `python loader_run.py NAME LOG`."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import trainyard as L
from tests.trainer.loaders import LOADERS, WITH_WORKERS, Counting, Numbers
from tests.trainer.test_resume_loaders import Model
from trainyard.utilities.combined_loader import CombinedLoader

# Of three ranks' length: what is used of it can be counted.
DIVIDED = {
    "counting sampler, two ranks": lambda: DataLoader(Numbers(), 3, sampler=Counting(), num_workers=1),
    "collection, two ranks": lambda: CombinedLoader(
        [DataLoader(Numbers(), 2, shuffle=True), DataLoader(Numbers(), 2, sampler=Counting())], "min_size"
    ),
}


class Slow(Model):
    """Notes each batch when it is done, and gives the test the time to kill it somewhere."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log_file = log

    def on_train_start(self) -> None:
        print(f"begin {self.trainer.loop_state.total_batches}", flush=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["means"] = list(self.means)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.means = checkpoint["means"]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        plan = self.trainer.batch_plan
        line = {
            "batch": self.trainer.loop_state.total_batches,
            "epoch": self.current_epoch,
            "labels": self.seen[-1][2],
        }
        line["padding"] = plan.padding
        with self.log_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(0.01)


def main(name: str, folder: Path) -> None:
    L.seed_everything(3, verbose=False)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    model = Slow(folder / f"rank-{trainer.global_rank}.jsonl")
    trainer.fit(model, (LOADERS | WITH_WORKERS | DIVIDED)[name]())
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.numpy().tobytes())
    print(f"end {digest.hexdigest()} {model.means} {torch.rand(1).item()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
