"""`.ckpt` files as the Trainer's methods offer them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainyard.trainer import ckpt_source, persistence

if TYPE_CHECKING:
    from trainyard.trainer.ckpt_source import Source
    from trainyard.trainer.trainer import Trainer


class CheckpointFiles:
    """Mixed into the Trainer."""

    ckpt_path: str | None = None
    """The file that the newest call of an entry point has loaded."""
    _asked: tuple[str | os.PathLike[str] | None, bool | None, bool] = (None, None, True)

    def save_checkpoint(  # type: ignore[misc]
        self: Trainer, filepath: str | os.PathLike[str], weights_only: bool | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write one file with everything in it (or with the weights only): a path, or `s3://bucket/key`.

        All ranks must call it. On return the file is there, whole; what was there before is replaced at that moment.
        Lightning loads it, and resumes from it. Raises RuntimeError before there is a module, OSError or
        CheckpointError if it cannot be written.
        """
        persistence.save(self, filepath, bool(weights_only), storage_options)

    def ask_for_checkpoint(
        self, ckpt_path: str | os.PathLike[str] | None, weights_only: bool | None, *, model_given: bool
    ) -> None:
        """What an entry point was told; it is looked for when the callbacks know their folders."""
        self._asked = (ckpt_path, weights_only, model_given)

    def open_checkpoint(self: Trainer) -> Source | None:  # type: ignore[misc]
        """Collective: what was asked for; None if there is nothing to load.

        Raises MisconfigurationException, and what `ckpt_file.read` does.
        """
        asked, weights_only, model_given = self._asked
        self.ckpt_path = ckpt_source.resolve(self, asked, fn=str(self.state.fn), model_given=model_given)
        if self.ckpt_path is None:
            return None
        source = ckpt_source.from_file(self, self.ckpt_path, weights_only)
        self.print(f"loaded {self.ckpt_path}", flush=True)
        return source
