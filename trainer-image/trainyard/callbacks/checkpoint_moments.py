"""When ModelCheckpoint may save, and where if nobody says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainyard.callbacks.checkpoint_folder import join

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer


def not_now(trainer: Trainer, saved_step: int) -> bool:
    """Nothing was learnt since the last save, or this is no real training."""
    return bool(
        trainer.fast_dev_run
        or trainer.state.fn != "fit"
        or trainer.sanity_checking
        or trainer.global_step == saved_step
    )


def saves_at_epoch_end(trainer: Trainer, asked: bool | None) -> bool:
    """At the training epoch's end, or else when validation ends (Lightning's rule).

    Where every epoch has one validation, at its end, the epoch's end is later, and has the training's metrics too.
    """
    if asked is not None:
        return asked
    if not trainer.val_feeds:
        return True
    return trainer.schedule.check_val_every_n_epoch == 1 and trainer.schedule.val_check_interval == 1.0


def validation_follows(trainer: Trainer) -> bool:
    """In on_train_batch_end: whether a validation comes before the next batch."""
    if not trainer.val_feeds:
        return False
    state, schedule, last = trainer.loop_state, trainer.schedule, trainer.is_last_batch
    if last:
        return schedule.validates_at_end(state, complete=True, should_stop=trainer.should_stop)
    return schedule.validates_within(state, batches=trainer.train_feed.batches, last=last)


def default_dirpath(trainer: Trainer) -> str:
    """`<save_dir>/<name>/<version>/checkpoints` of the first logger, else `checkpoints` in default_root_dir."""
    root = str(trainer.default_root_dir)
    if not trainer.loggers:
        return join(root, "checkpoints")
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    inner = str(Path(str(logger.name), version, "checkpoints"))
    return join(logger.save_dir or root, inner)
