"""The training loop, from top to bottom."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainyard.data.batches import size_of
from trainyard.data.connect import data_hook
from trainyard.data.loader import Feed, SampledFeed
from trainyard.data.sampler import Batch
from trainyard.errors import MisconfigurationException
from trainyard.reproducibility import isolate_rng

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer

_SKIP_EPOCH = -1


class FitLoop:
    """One fit: epochs of batches of steps, with the hooks in Lightning's order (callbacks first, then the module).

    Saves happen at quiet points only: after an optimizer step (and the validation that falls on it), or, when that step
    is the last of its epoch, after the epoch's end. So a resume never lands between a step and what belongs to it.
    """

    def __init__(
        self, trainer: Trainer, run_step: Callable[..., Any], restore_rank: Callable[[], None] | None
    ) -> None:
        self.trainer = trainer
        self.module = trainer.lightning_module
        self.state = trainer.loop_state
        self.metrics = trainer.metrics
        self.schedule = trainer.schedule
        self.feed: Feed = trainer.train_feed
        self.run_step = run_step
        self.restore_rank = restore_rank
        """To be called once, right before the first batch."""
        self._takes_index = _parameters(self.module.training_step) >= 2
        self._outputs: Any = None
        self._window_open = False
        """A backward pass has run since the last optimizer step."""

    # ---- the run

    def run(self) -> None:
        self.call("on_train_start")
        while not self.done():
            self.run_epoch()
        self.trainer.finish_checkpoints()
        self.call("on_train_end")

    def done(self) -> bool:
        return self.schedule.done(self.state, should_stop=self.trainer.should_stop)

    def run_epoch(self) -> None:
        self.open_epoch()
        complete = True
        with contextlib.closing(self.feed.iterate(self.state.epoch, self.state.samples)) as batches:  # type: ignore[type-var]
            for plan, raw in batches:
                if self.run_batch(plan, raw):
                    break
                if plan.steps and not plan.last:
                    if self.schedule.done_in_epoch(self.state, should_stop=self.trainer.should_stop):
                        complete = False
                        break
                    self.save_if_due(epoch_end=False)
        self.close_epoch(complete)
        if complete and not self.done():
            self.save_if_due(epoch_end=True)

    def open_epoch(self) -> None:
        """A resume in the middle of an epoch calls the hooks again, and then takes up what they may have changed."""
        restore, self.restore_rank = self.restore_rank, None
        fresh = not self.state.mid_epoch
        if fresh and restore is not None:
            restore()
        self.call("on_train_epoch_start")
        if not fresh and restore is not None:
            restore()

    def close_epoch(self, complete: bool) -> None:
        trainer, state = self.trainer, self.state
        stop = trainer.should_stop
        if trainer.val_feeds and self.schedule.validates_at_end(state, complete=complete, should_stop=stop):
            self.validate()
        where = {"step": max(0, state.step - 1), "epoch": state.epoch}
        self.metrics.flush_epoch(self.metrics.train, **where)
        self.call("on_train_epoch_end")
        self.metrics.flush_epoch(self.metrics.train, **where)
        self.metrics.train.reset()
        if complete:
            self.step_schedulers("epoch", plateau=True)
            state.next_epoch()
        trainer.should_stop = trainer.strategy.peers.any(
            trainer.should_stop
        )  # one rank's wish is everybody's

    # ---- one batch

    def run_batch(self, plan: Batch, raw: Any) -> bool:
        """Whether the rest of the epoch is to be skipped."""
        trainer, state, index = self.trainer, self.state, self.state.batches
        batch = self.transfer(raw, 0)
        trainer.batch_plan = plan
        self.metrics.stage, self.metrics.suffix = self.metrics.train, ""
        self.metrics.weight = 0 if plan.padding else size_of(batch)
        if self.call("on_train_batch_start", batch, index) == _SKIP_EPOCH:
            return True
        self.optimize(plan, batch, index)
        state.samples, state.batches = plan.end, state.batches + 1
        if plan.steps:
            self.step_schedulers("step", plateau=False)
        if plan.last:
            self.step_schedulers("epoch", plateau=False)
        self.call("on_train_batch_end", self._outputs, batch, index)
        if plan.steps:
            self.report(plan, batch)
        batches = self.feed.batches
        if trainer.val_feeds and self.schedule.validates_within(state, batches=batches, last=plan.last):
            self.validate()
        return False

    def optimize(self, plan: Batch, batch: Any, index: int) -> None:
        """Forward, backward, and the optimizer's step if the batch completes one."""
        module, optimizer = self.module, self.trainer.optimizers[0]

        def closure() -> torch.Tensor | None:
            loss = self.forward(plan, batch, index)
            if not self._window_open:
                self.call("on_before_zero_grad", optimizer)
                module.optimizer_zero_grad(self.state.epoch, index, optimizer)
            if loss is not None:
                self.call("on_before_backward", loss)
                module.backward(self.trainer.precision_plugin.scale(loss))
                self.call("on_after_backward")
            self._window_open = not plan.steps
            if plan.steps:
                self.call("on_before_optimizer_step", optimizer)
                module.configure_gradient_clipping(
                    optimizer, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
                )
            return loss

        if not plan.steps:
            with self.trainer.strategy.no_sync():
                closure()
            return
        module.optimizer_step(self.state.epoch, index, optimizer, closure)
        self.state.step += 1

    def forward(self, plan: Batch, batch: Any, index: int) -> torch.Tensor | None:
        """The loss, weighted so that the gradients add up to that of the mean over all samples of the step."""
        args = (batch, index) if self._takes_index else (batch,)
        with (
            self.hook("training_step"),
            self.trainer.precision_plugin.forward_context(self.trainer.strategy.device),
        ):
            output = self.run_step(*args)
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None:
            if self.trainer.world_size > 1:
                raise MisconfigurationException(
                    "training_step returned no loss: with several processes the others would wait for its gradients for "
                    "ever. Return a loss that is multiplied by 0 instead"
                )
            self._outputs = output
            return None
        if not isinstance(loss, torch.Tensor):
            raise MisconfigurationException(
                f"training_step must return a tensor, a dict with 'loss', or None; its loss is a {type(loss).__name__}"
            )
        detached = loss.detach()
        self._outputs = {**output, "loss": detached} if isinstance(output, dict) else {"loss": detached}
        if not plan.padding:
            self.trainer.last_loss = detached
        share = plan.weight
        if share == 1:
            return loss
        # In one operation, as somebody would write it by hand: loss / 4, not loss * 0.25.
        return loss / share.denominator if share.numerator == 1 else loss * float(share)

    # ---- around the steps

    def step_schedulers(self, interval: str, *, plateau: bool) -> None:
        """`plateau`: those that want a metric, which there is after validation only."""
        count = self.state.step if interval == "step" else self.state.epoch + 1
        for config in self.trainer.lr_scheduler_configs:
            if config.interval != interval or config.reduce_on_plateau != plateau or count % config.frequency:
                continue
            metric = None
            if config.reduce_on_plateau:
                metric = self.trainer.callback_metrics.get(str(config.monitor))
                if metric is None:
                    known = ", ".join(sorted(self.trainer.callback_metrics)) or "none"
                    if config.strict:
                        raise MisconfigurationException(
                            f"lr_scheduler: nothing was logged as {config.monitor!r}; there is: {known}"
                        )
                    continue
            self.module.lr_scheduler_step(config.scheduler, metric)

    def report(self, plan: Batch, batch: Any) -> None:
        trainer, state = self.trainer, self.state
        flush = state.step % trainer.log_every_n_steps == 0
        if flush:
            self.metrics.flush_step(step=state.step - 1, epoch=state.epoch)
        per_batch = plan.size if isinstance(self.feed, SampledFeed) else size_of(batch) * trainer.world_size
        trainer.progress.stepped(
            step=state.step, total=trainer.total_steps, epoch=state.epoch,
            samples=per_batch * trainer.accumulate_grad_batches, loss=trainer.last_loss, flush=flush,
        )  # fmt: skip
        if flush and trainer.printer is not None:
            trainer.printer.on_logs_flushed(trainer, self.module)

    def save_if_due(self, *, epoch_end: bool) -> None:
        checkpointer = self.trainer.checkpointer
        if checkpointer is not None and checkpointer.due(self.state.step, epoch_end=epoch_end):
            self.trainer.save_checkpoint_now()

    # ---- validation

    def sanity_check(self, batches: int) -> None:
        """A few batches of validation before anything is trained, so that its bugs show now and not in an hour."""
        trainer = self.trainer
        with isolate_rng():
            trainer.sanity_checking = self.metrics.quiet = True
            self.call("on_sanity_check_start", module=False)
            self.validate(limit=None if batches < 0 else batches)
            self.call("on_sanity_check_end", module=False)
            trainer.sanity_checking = self.metrics.quiet = False
            self.metrics.validate.reset()

    def validate(self, limit: int | None = None) -> None:
        trainer, module, metrics = self.trainer, self.module, self.metrics
        modes = [(m, m.training) for m in module.modules()]
        metrics.stage = metrics.validate
        metrics.validate.reset()
        with torch.inference_mode() if trainer.inference_mode else torch.no_grad():
            module.on_validation_model_eval()
            self.call("on_validation_start")
            self.call("on_validation_epoch_start")
            for number, feed in enumerate(trainer.val_feeds):
                metrics.suffix = f"/dataloader_idx_{number}" if len(trainer.val_feeds) > 1 else ""
                self.validate_loader(number, feed, limit)
            metrics.suffix = ""
            self.call("on_validation_epoch_end")
            metrics.flush_epoch(metrics.validate, step=max(0, self.state.step - 1), epoch=self.state.epoch)
            self.call("on_validation_end")
            module.on_validation_model_train()
        for part, training in modes:
            part.training = training
        metrics.stage = metrics.train

    def validate_loader(self, number: int, feed: Feed, limit: int | None) -> None:
        args = (number,) if len(self.trainer.val_feeds) > 1 else ()
        device, precision = self.trainer.strategy.device, self.trainer.precision_plugin
        takes = _parameters(self.module.validation_step)
        with contextlib.closing(feed.iterate(0, 0)) as batches:  # type: ignore[type-var]
            for index, (plan, raw) in enumerate(batches):
                if index == limit:
                    break
                if plan.padding:
                    continue  # nothing here is collective, and a sample must not be counted twice
                batch = self.transfer(raw, number)
                self.metrics.weight = size_of(batch)
                self.call("on_validation_batch_start", batch, index, *args)
                with self.hook("validation_step"), precision.forward_context(device):
                    output = self.module.validation_step(*(batch, index, *args)[:takes])
                self.call("on_validation_batch_end", output, batch, index, *args)

    # ---- hooks

    def transfer(self, batch: Any, loader: int) -> Any:
        """Through the three transfer hooks, of the data module if it has its own."""
        trainer = self.trainer
        batch = data_hook(trainer, "on_before_batch_transfer")(batch, loader)
        batch = data_hook(trainer, "transfer_batch_to_device")(batch, trainer.strategy.device, loader)
        return data_hook(trainer, "on_after_batch_transfer")(batch, loader)

    def call(self, hook: str, *args: Any, module: bool = True) -> Any:
        """The hook of all callbacks, then of the module; returns the last answer that is not None."""
        answer = None
        with self.hook(hook):
            for callback in self.trainer.callbacks:
                said = getattr(callback, hook)(self.trainer, self.module, *args)
                answer = said if said is not None else answer
            if module:
                said = getattr(self.module, hook)(*args)
                answer = said if said is not None else answer
        return answer

    @contextlib.contextmanager
    def hook(self, name: str) -> Iterator[None]:
        """For `self.log`, whose defaults depend on where it is called."""
        before, self.metrics.hook = self.metrics.hook, name
        try:
            yield
        finally:
            self.metrics.hook = before


def _parameters(function: Callable[..., Any]) -> int:
    """How many positional arguments it takes; many if it takes any."""
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 99
    return sum(
        k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds
    )
