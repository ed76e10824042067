"""A program without a launcher that forks its ranks, fit after fit. What it saw goes to the file of the first argument."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import trainyard as L
from tests.trainer.failing import Failing
from tests.trainer.models import loader
from trainyard.callbacks import ModelCheckpoint
from trainyard.failure import SIGTERMException


class Evaluated(Failing):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_sum", batch[0].sum(), sync_dist=True, reduce_fx="sum")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])


def trainer(folder: Path, run: str = "", **kwargs: Any) -> L.Trainer:
    L.seed_everything(1, verbose=False)
    checkpoint = (
        L.CheckpointConfig(uri=(folder / "engine").as_uri(), every_n_steps=100, run=run) if run else None
    )
    return L.Trainer(
        accelerator="cpu", strategy="ddp_fork", devices=2, max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, checkpoint=checkpoint, **kwargs,
    )  # fmt: skip


def weights(module: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.state_dict().values())).hexdigest()


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def raised(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except (Exception, SystemExit) as error:
        code = error.code if isinstance(error, SystemExit) else None
        return {"kind": type(error).__name__, "said": str(error), "code": code, "children": children()}
    return {"kind": "", "said": "", "code": None, "children": children()}


def whole_story(folder: Path) -> dict[str, Any]:
    keeper = ModelCheckpoint(dirpath=folder / "kept", monitor="val_loss")
    fitter = trainer(folder, callbacks=[keeper])
    module = Evaluated("nothing", 0)
    asked = (fitter.world_size, fitter.global_rank, fitter.num_devices)
    fitter.fit(module, loader(48), loader(8))
    expected = sum(batch[0].sum().item() for batch in loader(8))
    return {
        "asked": asked, "weights": weights(module), "step": fitter.global_step, "epoch": fitter.current_epoch,
        "metrics": sorted(fitter.callback_metrics), "best": keeper.best_model_path, "status": fitter.state.status,
        "there": Path(keeper.best_model_path).exists(), "best score": float(keeper.best_model_score),
        "val_loss": float(fitter.callback_metrics["val_loss"]), "on cpu": module.net.weight.device.type,
        "tested": fitter.test(module, loader(8), verbose=False), "expected": expected,
        "predicted": [tuple(p.shape) for p in fitter.predict(module, loader(8))], "children": children(),
    }  # fmt: skip


def main() -> None:
    output, folder = Path(sys.argv[1]), Path(sys.argv[2])
    found: dict[str, Any] = {"story": whole_story(folder)}

    def fit(what: str, rank: int, run: str = "") -> Callable[[], None]:
        return lambda: trainer(folder, run).fit(Evaluated(what, rank), loader(48), loader(8))

    found["exception"] = raised(fit("validation_step", 1))
    found["SIGKILL"] = raised(fit("SIGKILL", 1))
    found["SIGTERM"] = raised(fit("SIGTERM to the launcher", 1, run="stopped"))
    resumed = Evaluated("nothing", 0)
    trainer(folder, "stopped").fit(resumed, loader(48), loader(8))
    found["resumed"] = weights(resumed)
    assert SIGTERMException.__name__ == found["SIGTERM"]["kind"], found["SIGTERM"]
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
