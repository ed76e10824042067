"""Which files of a ModelCheckpoint are new, for loggers that keep models as artifacts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainyard.loggers.values import number

if TYPE_CHECKING:
    from trainyard.callbacks.model_checkpoint import ModelCheckpoint

_log = logging.getLogger("trainyard")

LogModel = Literal["all"] | bool
"""False: no models. True: those that are there at the end. "all": each one when it is written."""

_SETTINGS = ("monitor", "mode", "save_last", "save_top_k", "save_weights_only")


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A checkpoint: a file, or a folder of shards."""

    path: Path
    score: float | None
    aliases: tuple[str, ...]
    """"latest" for all, and "best" for the best one."""
    settings: dict[str, Any]
    """Of the callback."""

    @property
    def metadata(self) -> dict[str, Any]:
        return {"score": self.score, "original_filename": self.path.name, "ModelCheckpoint": self.settings}


class Uploads:
    """Remembers what was handed over, by path and time of change: `last.ckpt` is written again and again."""

    def __init__(self, log_model: LogModel) -> None:
        self.log_model = log_model
        self._callbacks: list[ModelCheckpoint] = []
        """More than one ModelCheckpoint may ride along."""
        self._seen: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"log_model": self.log_model, "_callbacks": [], "_seen": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def now(self, callback: ModelCheckpoint) -> Iterator[SavedModel]:
        """After the callback has saved. With save_top_k=-1 nothing is ever deleted, so there is nothing to wait for."""
        if not self.log_model:
            return
        if all(one is not callback for one in self._callbacks):
            self._callbacks.append(callback)
        if self.log_model == "all" or callback.save_top_k == -1:
            yield from self._new(callback)

    def at_end(self) -> Iterator[SavedModel]:
        for callback in self._callbacks:
            yield from self._new(callback)

    def _new(self, callback: ModelCheckpoint) -> Iterator[SavedModel]:
        """Oldest first, so that "latest" ends up at the newest. Marked as seen when the consumer comes back for more,
        that is, when it did not fail."""
        scores: dict[str, Any] = {}
        if callback.last_model_path:
            scores[callback.last_model_path] = callback.current_score
        scores.update(callback.best_k_models)
        if callback.best_model_path:
            scores[callback.best_model_path] = callback.best_model_score
        settings = {name: getattr(callback, name) for name in _SETTINGS if hasattr(callback, name)}
        found = []
        for name, score in scores.items():
            path = Path(name)
            if "://" in name and name not in self._seen:
                _log.warning("%s is kept where it is, and no artifact is made of it", name)
                self._seen[name] = 0.0
            if path.exists() and self._seen.get(name) != (changed := path.stat().st_mtime):
                found.append((changed, name, score))
        for changed, name, score in sorted(found, key=lambda entry: entry[:2]):
            aliases = ("latest", "best") if name == callback.best_model_path else ("latest",)
            yield SavedModel(Path(name), None if score is None else number(score), aliases, settings)
            self._seen[name] = changed
