"""A program that is told to stop after its third step, with more to save than its first argument, in MiB, is a part of."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import trainyard as L
from tests.trainer.models import Regression, loader


class Heavy(Regression):
    def __init__(self, mebibytes: int) -> None:
        super().__init__()
        self.ballast = torch.nn.Parameter(torch.zeros(mebibytes << 18), requires_grad=False)


class Stop(L.Callback):
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    folder, mebibytes = sys.argv[1:]
    L.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Stop()],
        checkpoint=L.CheckpointConfig(uri=Path(folder).as_uri(), every_n_steps=1000, run="r"),
    ).fit(Heavy(int(mebibytes)), loader())  # fmt: skip


if __name__ == "__main__":
    main()
