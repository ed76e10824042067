"""Tries batch sizes: a few steps with each, of which nothing remains."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainyard.data.connect import eval_feeds
from trainyard.errors import MisconfigurationException
from trainyard.tuner import attributes
from trainyard.tuner.oom import free_memory, is_oom_error
from trainyard.tuner.rehearsal import rehearsal

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer
    from trainyard.tuner.batch_size_search import BatchSizeSearch

_log = logging.getLogger("trainyard")
_STAGES = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
_STEPS = {"val": "validation", "test": "test", "predict": "predict"}


class BatchSizeTrials:
    """For the entry point that runs. All ranks try the same sizes, and a size fits if it fits on all of them.

    Raises MisconfigurationException if the batch size cannot be changed, or a failed trial could not be left.
    """

    def __init__(self, trainer: Trainer, name: str, steps: int) -> None:
        self._trainer, self._name, self._steps = trainer, name, steps
        self._stage = _STAGES[str(trainer.state.fn)]
        self._owners = [trainer.lightning_module, trainer.datamodule]
        self._error: BaseException | None = None
        attributes.read(self._owners, name)
        if trainer._given.get(self._stage) is not None:
            raise MisconfigurationException(
                f"the batch size of loaders that are given to {trainer.state.fn} cannot be changed: make them in a "
                f"{self._stage}_dataloader hook, with self.{name} or self.hparams.{name}"
            )
        if trainer.world_size > 1 and (trainer.strategy.forward_is_collective or trainer.strategy.has_engine):
            raise MisconfigurationException(
                f"strategy {trainer.strategy.name!r}: a rank that runs out of memory would leave the others waiting in "
                "its forward; find the batch size with one process, or with 'ddp'"
            )

    def run(self, search: BatchSizeSearch) -> int:
        """The largest size that fits, not set yet. Raises the memory error if not even one sample does."""
        trainer, before = self._trainer, attributes.read(self._owners, self._name)
        stage_steps = trainer.limit_train_batches if self._stage == "train" else None
        if stage_steps == 0:
            raise MisconfigurationException("limit_train_batches=0 leaves nothing to try")
        try:
            with rehearsal(trainer, [], self._steps) as self._snapshot, self._unsynchronised():
                found = search.run(self.fits, self._samples())
        finally:
            attributes.write(self._owners, self._name, before)
        if found is None:
            raise self._error or RuntimeError("no batch size fits")
        return found

    def fits(self, size: int) -> bool:
        """Whether the steps of one trial go through. Collective."""
        self._snapshot.restore()
        attributes.write(self._owners, self._name, size)
        error: BaseException | None = None
        try:
            self._train() if self._stage == "train" else self._evaluate()
        except Exception as problem:
            if not is_oom_error(problem):
                raise
            error = problem.with_traceback(None)  # its frames hold what there is too little room for
        self._trainer._train_feed = None
        if error is not None:
            free_memory()
        failed = self._trainer.strategy.peers.any(error is not None)
        if failed:
            self._error = error or RuntimeError(f"another rank ran out of memory with a batch size of {size}")
        self._trainer.print(f"Batch size {size} {'does not fit' if failed else 'succeeded'}")
        return not failed

    # ---- one trial

    def _train(self) -> None:
        from trainyard.loops.fit import FitLoop
        from trainyard.loops.hooks import HookCaller
        from trainyard.loops.state import LoopState

        trainer = self._trainer
        trainer.loop_state = LoopState(seed=trainer.loop_state.seed)
        trainer._train_feed = None
        trainer.hooks = HookCaller(trainer)
        trainer.fit_loop = loop = FitLoop(trainer, None)
        loop.call("on_train_start")
        loop.call("on_train_epoch_start")
        with contextlib.closing(loop.feed.iterate(0, 0)) as batches:  # type: ignore[type-var]
            for plan, raw in batches:
                if loop.run_batch(plan, raw) or trainer.loop_state.stepped >= self._steps:
                    break

    def _evaluate(self) -> None:
        from trainyard.data.transfer import Transfer
        from trainyard.loops.evaluation import eval_step

        trainer, metrics = self._trainer, self._trainer.metrics
        feeds = eval_feeds(trainer, None, self._stage)
        metrics.stage = metrics.test if self._stage == "test" else metrics.validate
        transfer, several = Transfer(trainer), len(feeds) > 1
        step = eval_step(trainer, f"{_STEPS[self._stage]}_step", several=several)
        for number, feed in enumerate(feeds):
            metrics.loader = number if several else None
            with contextlib.closing(feed.iterate(0, 0)) as batches:  # type: ignore[type-var]
                for index, (_, raw) in enumerate(itertools.islice(batches, self._steps)):
                    metrics.batch = batch = transfer(raw, number)
                    metrics.weight = None
                    step(batch, index, number)
            metrics.batch = None

    @contextlib.contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        """A rank that runs out of memory must not leave others in a collective: no gradients are exchanged."""
        strategy = self._trainer.strategy
        if self._trainer.world_size == 1:
            yield
            return
        strategy.step = getattr  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del strategy.step

    def _samples(self) -> int | None:
        """Of this rank's share of the data; None if there is no telling."""
        trainer = self._trainer
        feeds = [trainer.train_feed] if self._stage == "train" else trainer.eval_feeds
        try:
            return -(
                -max(len(loader.dataset) for loader in (feed.given for feed in feeds)) // trainer.world_size
            )
        except (AttributeError, TypeError):
            return None


def apply(trainer: Trainer, name: str, size: int) -> None:
    """Set the size, and make the loaders of the entry point that runs anew with it."""
    attributes.write([trainer.lightning_module, trainer.datamodule], name, size)
    stage = _STAGES[str(trainer.state.fn)]
    if stage != "train":
        trainer.eval_feeds[:] = eval_feeds(trainer, trainer._given[stage], stage)
        return
    trainer._train_feed = None
    if trainer.val_feeds and trainer._given["val"] is None:
        trainer.val_feeds = eval_feeds(trainer, None, "val")
    if trainer.fit_loop is not None:
        trainer.fit_loop.feed = trainer.train_feed
