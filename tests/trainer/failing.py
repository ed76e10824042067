"""A program that fails as its arguments say: `failing.py WHAT RANK [strategy [devices]]`.

It trains a linear model for twelve steps, with a validation in the middle, and prints what it came to.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch

import trainyard as L
from tests.trainer.models import Regression, loader
from trainyard.plugins.environments import ClusterEnvironment
from trainyard.strategies import DDPStrategy


class Failing(Regression):
    """Fails on one rank, at one moment."""

    def __init__(self, what: str, rank: int) -> None:
        super().__init__()
        self.what, self.victim = what, rank

    def at(self, moment: str, count: int = 0) -> bool:
        if self.what == moment and self.global_rank == self.victim and count == 0:
            raise ValueError(f"no luck in {moment}")
        return self.what == moment and self.global_rank == self.victim

    def prepare_data(self) -> None:
        self.at("prepare_data")

    def setup(self, stage: str) -> None:
        self.at("setup")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        step = self.trainer.global_step
        self.at("training_step", step - 4)
        if step == 4 and self.global_rank == self.victim:
            self.act()
        loss = self.loss(batch)
        self.log("loss", loss)
        time.sleep(0.01)
        return loss

    def act(self) -> None:
        if self.what == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.what == "SIGTERM to the launcher":
            os.kill(os.getppid(), signal.SIGTERM)
        elif self.what == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.what == "stuck":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        elif self.what == "exit":
            os._exit(3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.at("validation_step", self.trainer.sanity_checking)
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        self.at("configure_optimizers")
        return super().configure_optimizers()

    def on_train_end(self) -> None:
        if self.what == "collective" and self.global_rank == self.victim:
            self.all_gather(torch.ones(3))

    def on_fit_end(self) -> None:
        self.at("on_fit_end")


class Mine(ClusterEnvironment):
    """A cluster of the user's own, where MINE is rank, world size and port."""

    creates_processes_externally = True
    main_address = "127.0.0.1"

    @property
    def main_port(self) -> int:
        return self.world_size(2)

    def world_size(self, part: int = 1) -> int:
        return int(os.environ["MINE"].split()[part])

    def global_rank(self) -> int:
        return self.world_size(0)

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.global_rank()


class Slow(L.Callback):
    """On the way out of a failure: longer than anybody would wait."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, ValueError):
            time.sleep(120)


def main() -> None:
    what, rank = sys.argv[1], int(sys.argv[2])
    strategy: Any = sys.argv[3] if len(sys.argv) > 3 else "ddp"
    if what == "script" and os.environ.get("RANK", "0") == str(rank):
        raise KeyError("no luck before the Trainer")
    if what == "collective":
        strategy = DDPStrategy(timeout=timedelta(seconds=2))
    L.seed_everything(1, verbose=False)
    folder = os.environ.get("FAILING_CHECKPOINTS")
    trainer = L.Trainer(
        accelerator="cpu", strategy=strategy, devices=int(sys.argv[4]) if len(sys.argv) > 4 else "auto", max_epochs=2,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(folder),
        num_sanity_val_steps=0, callbacks=[Slow()] if what == "training_step" else [],
        checkpoint=L.CheckpointConfig(uri=folder, every_n_steps=100, run="failing") if folder else None,
        num_nodes=int(os.environ.get("FAILING_NODES", "1")), plugins=[Mine()] if what == "environment" else None,
    )  # fmt: skip
    module = Failing(what, rank)
    trainer.fit(module, loader(48), loader(8))
    if trainer.is_global_zero:
        weights = b"".join(t.numpy().tobytes() for t in module.state_dict().values())
        print(f"steps {trainer.global_step} weights {hashlib.sha256(weights).hexdigest()}", flush=True)


if __name__ == "__main__":
    main()
