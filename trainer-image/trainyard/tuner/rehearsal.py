"""A stretch of training of which nothing remains."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainyard.logged.metrics import Metrics
from trainyard.loops.hooks import HookCaller
from trainyard.loops.state import LoopState
from trainyard.loops.stop import NoStop
from trainyard.trainer.progress import Progress
from trainyard.tuner.snapshot import Snapshot

if TYPE_CHECKING:
    from trainyard.callbacks.base import Callback
    from trainyard.loggers.base import Logger
    from trainyard.trainer.trainer import Trainer


@contextmanager
def rehearsal(trainer: Trainer, callbacks: list[Callback], steps: int) -> Iterator[Snapshot]:
    """In here the trainer is at the start of a fit of `steps` optimizer steps with these callbacks alone, without loggers,
    validation, schedulers, checkpoints; outside, everything is as it was. To be opened between two steps."""
    attributes = dict(vars(trainer))
    loaders = [] if trainer._train_feed is None else [trainer.train_dataloader]
    loaders += [getattr(feed, "given", None) for feed in trainer.eval_feeds]
    snapshot = Snapshot(trainer, loaders)
    try:
        trainer.state = dataclasses.replace(trainer.state)
        trainer.schedule = dataclasses.replace(
            trainer.schedule, max_epochs=-1, max_steps=steps, min_epochs=0, min_steps=0
        )
        trainer.callbacks, trainer.loggers = callbacks, silent_loggers(trainer)
        trainer.loop_state = LoopState(seed=trainer.loop_state.seed)
        trainer.metrics = Metrics(trainer.strategy, [])
        trainer.progress, trainer.stop, trainer.checkpointer = Progress(None), NoStop(), None
        trainer.val_feeds, trainer.lr_scheduler_configs = [], []
        trainer.log_every_n_steps = sys.maxsize  # a flush is collective, and waits for the device
        trainer.reload_dataloaders_every_n_epochs = 0
        trainer.should_stop = False
        trainer.hooks = HookCaller(trainer)
        yield snapshot
    finally:
        vars(trainer).clear()
        vars(trainer).update(attributes)
        snapshot.restore()


def silent_loggers(trainer: Trainer) -> list[Logger]:
    """Modules may use `self.logger.experiment`: there is one that swallows everything."""
    from trainyard.loggers.dummy import DummyLogger

    return [DummyLogger() for _ in trainer.loggers]
