"""What a ModelCheckpoint knows of the files that it has written, and how that gets over a restart."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainyard.callbacks import checkpoint_folder as files
from trainyard.callbacks.checkpoint import Checkpoint
from trainyard.callbacks.checkpoint_topk import TopK

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


class CheckpointRecords(Checkpoint):
    """The part of ModelCheckpoint that is in checkpoints. `dirpath`: whole, None to have it found."""

    monitor: str | None

    def __init__(self, dirpath: str | None, top: TopK) -> None:
        self._given_dirpath = dirpath
        self.top = top
        self.folder = files.Folder(dirpath)
        self.current_score: torch.Tensor | None = None
        self.best_model_score: torch.Tensor | None = None
        self.best_model_path = ""
        self.last_model_path = ""
        self._scores: dict[str, torch.Tensor] = {}
        """By path, as tensors: `top` has the same as numbers."""
        self._newest = ""
        """Where a link to the last checkpoint leads."""
        self._saved_step = 0
        self._deferred = False
        """A save is due, and waits for the validation that follows at once."""
        self._goes_on = False
        """The state is that of this very run, not one that the user has picked."""

    @property
    def dirpath(self) -> str | None:
        """Whole; known from setup on if it was not given."""
        return self.folder.path

    @dirpath.setter
    def dirpath(self, path: str | Path | None) -> None:
        self.folder.path = None if path is None else files.whole(path)

    @property
    def best_k_models(self) -> dict[str, torch.Tensor]:
        """Scores by path."""
        return dict(self._scores)

    @property
    def kth_best_model_path(self) -> str:
        """The worst that is kept; empty while there are less than k."""
        return (self.top.kth or "") if self.top.full or self.top.k == -1 else ""

    @property
    def kth_value(self) -> torch.Tensor:
        """Of `kth_best_model_path`; the worst there is if that is empty."""
        kth = self.kth_best_model_path
        return self._scores[kth] if kth else torch.tensor(self.top.worst_score)

    def _show_scores(self) -> None:
        self._scores = {path: as_tensor(score) for path, score in self.top.scores.items()}
        best = self.top.best
        if best is not None:
            self.best_model_path, self.best_model_score = best, self._scores[best]

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Lightning's keys, but paths are relative to `dirpath` where they are in it, for pods may move."""

        def short(path: str) -> str:
            return files.relative(self.dirpath, path)

        return {
            "monitor": self.monitor,
            "best_model_score": self.best_model_score,
            "best_model_path": short(self.best_model_path),
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": {short(path): score for path, score in self._scores.items()},
            "kth_best_model_path": short(self.kth_best_model_path),
            "kth_value": self.kth_value,
            "last_model_path": short(self.last_model_path),
            "trainyard": {
                "newest": short(self._newest), "saved_step": self._saved_step, "deferred": self._deferred,
                "folder": self.folder.state(),
            },
        }  # fmt: skip

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._goes_on = trainer.state.fn == "fit" and trainer.ckpt_path is None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of ours or of Lightning's, whose paths are whole ones."""
        before: str | None = state_dict.get("dirpath")
        if self._goes_on and self._given_dirpath is None and before is not None and Path(before).is_dir():
            self.dirpath = before  # the logger may have begun a new version; the run has not

        def locate(path: str) -> str:
            return files.locate(path, before, self.dirpath) if path else ""

        self.best_model_path = locate(state_dict["best_model_path"])
        self.last_model_path = locate(state_dict.get("last_model_path", ""))
        self.best_model_score = _tensor(state_dict.get("best_model_score"))
        self.current_score = _tensor(state_dict.get("current_score"))
        scores = {locate(path): float(score) for path, score in state_dict.get("best_k_models", {}).items()}
        self.top.scores = scores
        self._scores = {path: as_tensor(score) for path, score in scores.items()}
        ours = state_dict.get("trainyard")
        if ours is None:
            self.folder.adopt({*scores, self.best_model_path, self.last_model_path} - {""})
            return
        self._newest = locate(ours["newest"])
        self._saved_step, self._deferred = int(ours["saved_step"]), bool(ours["deferred"])
        self.folder.load(ours["folder"], locate)

    def _agree(self, trainer: Trainer) -> None:
        """Collective: what rank 0 has restored counts, less the files that are gone: nobody could load them, and a worse
        one that is there is better than that."""
        said: dict[str, Any] = {}
        if trainer.is_global_zero:
            gone = files.missing({*self.top.scores, self.best_model_path, self._newest} - {""})
            if gone:
                _log.warning(
                    "ModelCheckpoint no longer finds %s, and counts on it no more", ", ".join(sorted(gone))
                )
            said = {
                "scores": {path: score for path, score in self.top.scores.items() if path not in gone},
                "best": "" if self.best_model_path in gone else self.best_model_path,
                "newest": "" if self._newest in gone else self._newest,
                "last": self.last_model_path, "gone": bool(gone),
                "saved_step": self._saved_step, "deferred": self._deferred,
            }  # fmt: skip
        said = trainer.strategy.peers.broadcast(said)
        self.top.scores = said["scores"]
        self.best_model_path, self.last_model_path = said["best"], said["last"]
        self._newest, self._deferred = said["newest"], said["deferred"]
        # A fit that does not go on from that state begins to count anew.
        self._saved_step = said["saved_step"] if said["saved_step"] <= trainer.global_step else 0
        if said["gone"]:
            self.best_model_score = None
        self._show_scores()


def as_tensor(score: float) -> torch.Tensor:
    """Exactly `score`, or a resumed run would compare with another number."""
    single = torch.tensor(score, dtype=torch.float32)
    return single if single.item() == score else torch.tensor(score, dtype=torch.float64)


def _tensor(value: Any) -> torch.Tensor | None:
    return None if value is None else torch.as_tensor(value).cpu()
