"""What the ranks of test_xla.py do, in an environment with torch_xla: `xla_cases.py CASE FOLDER`.

Each case is a run that the test compares with the same one on the CPU in its own process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trainyard as L
from tests.trainer.models import numbers

ON_XLA = os.environ.get("PJRT_DEVICE") == "CPU"


class Fitted(L.LightningModule):
    """Accumulates and clips; a buffer, a scheduler, logged values."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1))
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.register_buffer("seen", torch.zeros(1))
        self.devices: set[str] = set()

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        self.devices.add(inputs.device.type)
        return nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).cpu()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def trainer(**more: Any) -> L.Trainer:
    L.seed_everything(11, verbose=False)
    return L.Trainer(
        accelerator="tpu" if ON_XLA else "cpu", enable_progress_bar=False, enable_model_summary=False, logger=False,
        enable_checkpointing=False, log_every_n_steps=1,
        **{"max_epochs": 2, "num_sanity_val_steps": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, **more},
    )  # fmt: skip


def loader(count: int, size: int) -> Any:
    return torch.utils.data.DataLoader(numbers(count), size, shuffle=count == 24)


def fit(
    path: Path | None = None, *, save: Path | None = None, dropout: float = 0.0, **more: Any
) -> dict[str, Any]:
    made, module = trainer(**more), Fitted(dropout=dropout)
    # The same global batches, whatever the number of ranks.
    size = 4 // made.world_size
    made.fit(module, loader(24, size), loader(9, 3), ckpt_path=None if path is None else str(path))
    if save is not None:
        made.save_checkpoint(save)
    return {
        "weights": {name: value.cpu().clone() for name, value in module.state_dict().items()},
        "metrics": {name: float(value) for name, value in made.callback_metrics.items()},
        "steps": made.global_step, "strategy": made.strategy.name, "devices": module.devices,
        "trainer": made, "module": module,
    }  # fmt: skip


def plain(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("weights", "metrics", "steps", "strategy", "devices")}


def manual() -> dict[str, Any]:
    class Manual(Fitted):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    made, module = trainer(accumulate_grad_batches=1, gradient_clip_val=None, max_epochs=1), Manual()
    made.fit(module, loader(24, 4 // made.world_size))
    return {name: value.cpu() for name, value in module.state_dict().items()}


def runs(folder: Path) -> dict[str, Any]:
    """A whole run, and one that leaves a file."""
    whole = fit()
    found = {"whole": plain(whole), "half": plain(fit(save=folder / f"half-{ON_XLA}.ckpt", max_epochs=1))}
    guesses = whole["trainer"].predict(whole["module"], loader(6, 3))
    found["predicted"] = torch.cat([guess.clone() for guess in guesses])
    found["validated"] = whole["trainer"].validate(whole["module"], loader(6, 3), verbose=False)
    found["bf16"] = plain(fit(precision="bf16-mixed", max_epochs=1))
    found["manual"] = manual()
    found["dropout"] = plain(fit(dropout=0.5))
    fit(save=folder / f"dropout-{ON_XLA}.ckpt", dropout=0.5, max_epochs=1)
    return found


def resumed(folder: Path) -> dict[str, Any]:
    torch.manual_seed(99)
    found = {
        "resumed": plain(fit(folder / f"half-{ON_XLA}.ckpt")),
        "dropout": plain(fit(folder / f"dropout-{ON_XLA}.ckpt", dropout=0.5)),
    }
    if (folder / f"half-{not ON_XLA}.ckpt").exists():
        found["from the other"] = plain(fit(folder / f"half-{not ON_XLA}.ckpt"))
    return found


def two(folder: Path) -> dict[str, Any]:
    """Several ranks; different weights to begin with are rank 0's."""
    found = {
        "whole": plain(fit(save=folder / "two.ckpt", max_epochs=1)),
        "resumed": plain(fit(folder / "two.ckpt")),
    }
    made, module = trainer(max_epochs=1, accumulate_grad_batches=1, gradient_clip_val=None), Fitted()
    with torch.no_grad():
        module.net[0].weight += made.global_rank
    made.fit(module, loader(24, 2))
    found["synchronised"] = {name: value.cpu() for name, value in module.state_dict().items()}
    strategy = made.strategy
    mine = torch.tensor([1.0 + made.global_rank, 2.0], device=strategy.device)
    found["reduced"] = {op: strategy.reduce(mine, reduce_op=op).cpu() for op in ("mean", "sum", "max", "min")}
    leaf = mine.clone().requires_grad_()
    gathered = strategy.all_gather(leaf, sync_grads=True)
    (gathered.sum() * (1 + made.global_rank)).backward()
    found["gathered"], found["gradient"] = gathered.detach().cpu(), leaf.grad.cpu()
    found["broadcast"] = strategy.broadcast({"rank": made.global_rank})
    return found


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    found = globals()[case](folder)
    torch.save(found, folder / f"{case}-{os.environ['RANK']}")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
