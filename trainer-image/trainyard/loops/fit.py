"""The training loop, from top to bottom."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trainyard.checkpoint.triggers import TimeTrigger
from trainyard.data.batches import size_of
from trainyard.data.batching import settle
from trainyard.data.loader import Feed, SampledFeed
from trainyard.data.transfer import Transfer
from trainyard.determinism import seed_batch, seed_between
from trainyard.failure.errors import SIGTERMException
from trainyard.loops.evaluation import EvaluationLoop
from trainyard.optimization.make import make_optimization
from trainyard.optimization.schedulers import step_schedulers
from trainyard.reproducibility import isolate_rng
from trainyard.trainer.rescue import Rescue
from trainyard.trainer.states import RunningStage

if TYPE_CHECKING:
    from trainyard.data.sampler import Batch
    from trainyard.trainer.trainer import Trainer

_SKIP_EPOCH = -1
_NEXT = "[_TrainingEpochLoop].train_dataloader_next"


class FitLoop:
    """One fit: epochs of batches of steps, with the hooks in Lightning's order (callbacks first, then the module).

    Saves happen at quiet points only: after an optimizer step (and the validation that falls on it), or, when that step
    is the last of its epoch, after the epoch's end. So a resume never lands between a step and what belongs to it.
    """

    def __init__(self, trainer: Trainer, restore_rank: Callable[[], None] | None) -> None:
        self.trainer = trainer
        self.call = trainer.hooks
        self.state = trainer.loop_state
        self.metrics = trainer.metrics
        self.schedule = trainer.schedule
        self.stop = trainer.stop
        self.feed: Feed = trainer.train_feed
        settle(trainer, self.feed)  # it may have been there before the checkpoint was
        self._begun_at = self.state.total_batches
        self._reported = 0
        """Samples of the epoch that `report` has told of."""
        self.restore_rank = restore_rank
        """To be called once, right before the first batch."""
        self.rescue = trainer.rescue = Rescue.of(trainer)
        self._total_steps: int | None = None
        self.optimization = make_optimization(trainer, self.call)
        self.transfer = Transfer(trainer)
        self.validation = EvaluationLoop(trainer, "validation", within_fit=True)
        self._validation_clock = self._make_clock()

    # ---- the run

    def run(self) -> None:
        if self.trainer.val_feeds and self.trainer.num_sanity_val_steps and self.restore_rank is None:
            self.sanity_check(self.trainer.num_sanity_val_steps)
        self.trainer.state.stage = RunningStage.TRAINING
        self.stop.rescue = self.rescue
        with torch.enable_grad():
            self.call("on_train_start")
            run_epoch = self.call.profiled("run_training_epoch", self.run_epoch)
            while not self.done():
                self.look_for_stop()
                run_epoch()
            if self.restore_rank is not None:  # a finished run: for what the script does after it
                self.restore_rank()
            self.trainer.finish_checkpoints()
            self.stop.rescue = None
            self.call("on_train_end")
        self.look_for_stop()

    def done(self) -> bool:
        return self.schedule.done(self.state, should_stop=self.trainer.should_stop)

    def run_epoch(self) -> None:
        state, schedule, trainer = self.state, self.schedule, self.trainer
        self.open_epoch()
        complete = True
        if state.validates:
            self.validate()
            self._begun_at = -1  # that it is done is news, though no batch came with it
            if trainer.checkpointer is not None:
                trainer.checkpointer.changed()
        run_batch = self.call.profiled("run_training_batch", self.run_batch)
        feed = self.call.profiled_items(_NEXT, self.feed.iterate(state.epoch, state.samples))
        with contextlib.closing(feed) as batches:  # type: ignore[type-var]
            for plan, raw in batches:
                if run_batch(plan, raw):
                    break
                if plan.steps and not plan.last:
                    if schedule.done_in_epoch(state, should_stop=trainer.should_stop):
                        complete = False
                        break
                    self.complete()
                    self.save_if_due(epoch_end=False)
                if not plan.last:
                    self.look_for_stop()
        self.close_epoch(complete)
        if complete and not self.done():
            self.complete()
            self.save_if_due(epoch_end=True)

    def open_epoch(self) -> None:
        """A resume in the middle of an epoch calls the hooks again, and then takes up what they may have changed."""
        restore, self.restore_rank = self.restore_rank, None
        fresh = not self.state.mid_epoch
        self.forget_draws("epoch")
        if fresh and restore is not None:
            restore()
        if fresh:
            self.trainer.reload_train_feed()
            self.feed = self.trainer.train_feed
        self.call.refresh()
        self.call("on_train_epoch_start")
        self.feed.accumulate = self.trainer.accumulate_grad_batches
        self._reported = self.state.samples
        self._total_steps = self.trainer.total_steps
        if not fresh and restore is not None:
            restore()
        self.forget_draws("epoch opened")

    def forget_draws(self, where: str) -> None:
        """With virtual ranks: what this process has drawn so far must not matter."""
        if self.trainer.strategy.virtual_ranks:
            seed_between(self.state, where)

    def close_epoch(self, complete: bool) -> None:
        trainer, state = self.trainer, self.state
        due = self.schedule.validates_at_end(
            state, complete=complete, should_stop=trainer.should_stop, scale=self.feed.scale
        )
        if trainer.val_feeds and due and not state.validated:
            self.validate()
        where = {"step": max(0, state.stepped - 1), "epoch": state.epoch}
        self.metrics.flush_epoch(self.metrics.train, **where)
        self.call("on_train_epoch_end")
        self.metrics.flush_epoch(self.metrics.train, **where)
        self.metrics.train.reset()
        if complete:
            step_schedulers(trainer, "epoch", plateau=True)
            state.next_epoch()
        trainer.should_stop = trainer.strategy.peers.any(
            trainer.should_stop
        )  # one rank's wish is everybody's

    # ---- one batch

    def run_batch(self, plan: Batch, raw: Any) -> bool:
        """Whether the rest of the epoch is to be skipped."""
        trainer, state, metrics, call = self.trainer, self.state, self.metrics, self.call
        index = state.batches + plan.turn
        own, moment = None if plan.padding else plan.virtual, state.step
        if plan.virtual is not None:
            seed_batch(state, plan)
            metrics.enter(own, moment)
        batch = self.transfer(raw, 0)
        trainer.batch_plan = plan
        trainer.is_last_batch = plan.last
        metrics.batch, metrics.weight = batch, 0 if plan.padding else None
        if call("on_train_batch_start", batch, index) == _SKIP_EPOCH:
            return True
        stepped = state.stepped
        self.optimization.run(plan, batch, index)
        if plan.counts:
            state.samples, state.validated = plan.end, False
            state.batches += plan.counts
            state.total_batches += plan.counts
        if plan.steps:
            step_schedulers(trainer, "step", plateau=False)
        if plan.last:
            step_schedulers(trainer, "epoch", plateau=False)
        if own is not None:  # between the two it was the step of all
            metrics.enter(own, moment)
        call("on_train_batch_end", self.optimization.outputs, batch, index)
        if own is not None:
            metrics.enter(None, moment)
        if state.stepped > stepped:
            self.report(plan, batch)
        metrics.batch = None
        if trainer.val_feeds and self.validation_is_due(plan):
            self.validate()
        return False

    def validation_is_due(self, plan: Batch) -> bool:
        """After a batch, but for the epoch's last: `close_epoch` sees to that."""
        if self._validation_clock is not None:
            return plan.steps and self._validation_clock.due(self.state.total_batches)
        return self.schedule.validates_within(
            self.state, batches=self.feed.batches, last=plan.last, scale=self.feed.scale, counts=plan.counts
        )

    def _make_clock(self) -> TimeTrigger | None:
        seconds, peers = self.schedule.val_check_seconds, self.trainer.strategy.peers
        if seconds is None:
            return None

        def tell(verdict: tuple[bool, int]) -> tuple[bool, int]:
            due, step = peers.broadcast(verdict)
            return due, step

        return TimeTrigger(seconds, leader=peers.rank == 0, broadcast=tell)

    def report(self, plan: Batch, batch: Any) -> None:
        """After a batch with which an optimizer stepped."""
        trainer, state = self.trainer, self.state
        flush = state.stepped % trainer.log_every_n_steps == 0
        if flush:
            self.metrics.flush_step(step=state.stepped - 1, epoch=state.epoch)
        total = self._total_steps if state.step == state.stepped else trainer.total_steps
        samples, self._reported = state.samples - self._reported, state.samples
        if not isinstance(self.feed, SampledFeed):  # its positions are numbers of batches
            samples *= size_of(batch)
        trainer.progress.stepped(
            step=state.step,
            total=total,
            epoch=state.epoch,
            samples=samples,
            loss=trainer.last_loss,
            flush=flush,
        )
        if flush:
            self.call("on_logs_flushed")

    # ---- validation

    def sanity_check(self, batches: int) -> None:
        """A few batches of validation before anything is trained, so that its bugs show now and not in an hour."""
        trainer = self.trainer
        with isolate_rng():
            trainer.state.stage = RunningStage.SANITY_CHECKING
            self.metrics.quiet = True
            self.call("on_sanity_check_start")
            self.validation.run(trainer.val_feeds, limit=None if batches < 0 else batches)
            self.call("on_sanity_check_end")
            self.metrics.end_quiet()

    def validate(self) -> None:
        """Left in the middle when all ranks are on their way out: then it is done anew after the resume."""
        trainer, state = self.trainer, self.state
        if self.rescue is not None:
            self.rescue.complete(validates=True)
        state.validates, state.validated = False, True
        trainer.state.stage = RunningStage.VALIDATING
        complete = self.validation.run(trainer.val_feeds)
        if self.rescue is not None:
            self.rescue.changes()  # hooks come, and schedulers
        if self._validation_clock is not None:
            self._validation_clock.saved()
        trainer.state.stage = RunningStage.TRAINING
        if not complete:
            state.validates, state.validated = True, False
            self.leave()

    # ---- saves

    def complete(self) -> None:
        """At a quiet point: this is what is saved if something raises before the weights change again."""
        if self.rescue is not None:
            self.rescue.complete()

    def save_if_due(self, *, epoch_end: bool) -> None:
        trainer = self.trainer
        if trainer.checkpointer is not None and (
            reason := trainer.checkpointer.due(self.state.step, epoch_end=epoch_end)
        ):
            trainer.save_checkpoint_now(reason)

    def look_for_stop(self) -> None:
        """Before anything of the next batch, its loading too: all ranks leave here, or none. Raises SIGTERMException."""
        upcoming = self.state.total_batches + 1
        if self.optimization.window_open:
            self.stop.announce(upcoming)
        elif self.stop.begins(upcoming):
            self.leave()

    def leave(self) -> None:
        """All ranks are at the same quiet point: save if there is time, and end. Raises SIGTERMException."""
        trainer = self.trainer
        where = f"{self.stop.requested_by}: stopping after step {self.state.step}"
        saves = trainer.checkpointer is not None and self.state.total_batches > self._begun_at
        trainer.print(f"{where}{', saving' if saves else ''}", flush=True)
        # Without a new step what it began with is the newest that there is.
        if saves and (why := trainer.leave_checkpoints(self.stop.seconds_left())):
            where += f", which is not saved: {why}"
            trainer.print(where, flush=True)
        raise SIGTERMException(where)
