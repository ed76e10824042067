"""For the loggers' tests: a quiet environment for the vendors' SDKs, and a ModelCheckpoint that saves on demand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from trainyard.loggers.identity import _made

RUN_UID = "TRAINYARD_RUN_UID"
QUIET = {
    "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_GIT": "true", "WANDB_X_DISABLE_STATS": "true", "WANDB_X_DISABLE_MACHINE_INFO": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true",
    "COMET_DISABLE_AUTO_LOGGING": "1", "COMET_LOGGING_CONSOLE": "error", "COMET_ERROR_TRACKING_ENABLE": "false",
    "COMET_DISABLE_ANNOUNCEMENT": "true",
}  # fmt: skip
"""What keeps the SDKs from calling home, and from looking around on the machine."""


def quiet(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """And all that they keep goes below `folder`."""
    for name in [n for n in os.environ if n.startswith(("WANDB_", "MLFLOW_", "COMET_"))]:
        monkeypatch.delenv(name)
    for name in (RUN_UID, "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "COMET_OFFLINE_DIRECTORY"):
        monkeypatch.setenv(name, str(folder / name.lower()))


def new_attempt(monkeypatch: pytest.MonkeyPatch, uid: str = "uid-1") -> None:
    """The script's process starts again, in the same TrainingRun."""
    monkeypatch.setenv(RUN_UID, uid)
    _made.clear()


class Saver:
    """What loggers read from a ModelCheckpoint that keeps its two best; "files" as it would write them."""

    monitor, mode, save_last, save_weights_only = "val_loss", "min", True, False

    def __init__(self, folder: Path, save_top_k: int = 2) -> None:
        self.folder, self.save_top_k = folder, save_top_k
        folder.mkdir(parents=True, exist_ok=True)
        self.best_k_models: dict[str, torch.Tensor] = {}
        self.best_model_path = self.last_model_path = ""
        self.best_model_score: torch.Tensor | None = None
        self.current_score: torch.Tensor | None = None
        self._clock = 1_000_000_000

    def save(self, loggers: list[Any], epoch: int, score: float) -> None:
        self.current_score = torch.tensor(score)
        path, last = self.folder / f"epoch={epoch}.ckpt", self.folder / "last.ckpt"
        for file in (path, last):
            file.write_text(f"weights of epoch {epoch}")
            self._clock += (
                1  # two files of one second have different times, whatever the file system keeps of them
            )
            os.utime(file, (self._clock, self._clock))
        self.last_model_path = str(last)
        self.best_k_models[str(path)] = self.current_score
        if self.save_top_k > 0 and len(self.best_k_models) > self.save_top_k:
            worst = max(self.best_k_models, key=lambda name: float(self.best_k_models[name]))
            del self.best_k_models[worst]
            Path(worst).unlink()
        self.best_model_path = min(self.best_k_models, key=lambda name: float(self.best_k_models[name]))
        self.best_model_score = self.best_k_models[self.best_model_path]
        for logger in loggers:
            logger.after_save_checkpoint(self)
