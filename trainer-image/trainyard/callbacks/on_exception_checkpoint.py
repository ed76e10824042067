"""OnExceptionCheckpoint: a file of the state in which a fit failed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from trainyard.callbacks import checkpoint_folder as files
from trainyard.callbacks.checkpoint import Checkpoint
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


class OnExceptionCheckpoint(Checkpoint):
    """`lightning.pytorch.callbacks.OnExceptionCheckpoint`. Raises MisconfigurationException for an empty name."""

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | Path, filename: str = "on_exception") -> None:
        if not filename:
            raise MisconfigurationException("OnExceptionCheckpoint(filename=''): the file needs a name")
        self.dirpath = str(dirpath)
        self.filename = filename

    @property
    def ckpt_path(self) -> str:
        return files.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        save_after_failure(trainer, self.ckpt_path, exception)


def save_after_failure(
    trainer: Trainer, path: str, exception: BaseException, *, weights_only: bool = False
) -> bool:
    """Whether `path` was written by this process. Nothing that goes wrong here hides `exception`.

    With several processes the others may be anywhere, so nothing here waits for them: rank 0 writes what it has, which is
    all but the other ranks' generators. Of a model that is spread over the ranks nobody can write the whole.
    """
    from trainyard.failure.errors import SIGTERMException

    together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
    try:
        if together:
            trainer.save_checkpoint(path, weights_only)
            return True
        if not trainer.is_global_zero:
            return False
        if trainer.strategy.forward_is_collective:
            _log.warning("no %s: the model is spread over processes that may have gone", path)
            return False
        from trainyard.trainer import ckpt_file, persistence

        ckpt_file.write(persistence.dump(trainer, weights_only), path)
    except Exception as error:
        _log.warning("no %s: %s: %s", path, type(error).__name__, error)
        return False
    _log.info("saved %s after %s", path, type(exception).__name__)
    return True
