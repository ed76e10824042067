"""Validation and test: every sample once, nothing learnt."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from trainyard.data.loader import Feed
from trainyard.data.transfer import Transfer
from trainyard.determinism import seed_between, seed_evaluation
from trainyard.failure.stop import LAST
from trainyard.loops.steps import make_step, positional
from trainyard.reproducibility import rng_state, set_rng_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainyard.strategies.base import Step
    from trainyard.trainer.trainer import Trainer


class EvaluationLoop:
    """`stage`: "validation" or "test", as in the hooks' names."""

    def __init__(self, trainer: Trainer, stage: str, *, within_fit: bool = False) -> None:
        self.trainer = trainer
        self.stage = stage
        self.within_fit = within_fit
        self.results = trainer.metrics.test if stage == "test" else trainer.metrics.validate
        self.found: list[dict[str, float]] = []
        """By loader: what was logged for the epoch."""
        self._transfer = Transfer(trainer)
        self._steps = 0
        self._begun = 0
        """Batches of this run of the loop, over all loaders."""

    def run(self, feeds: list[Feed], limit: int | None = None) -> bool:
        """`limit`: batches of each loader. False if it was left in the middle; then nothing of it shows."""
        trainer, metrics = self.trainer, self.trainer.metrics
        call, stage = trainer.hooks, self.stage
        rng = rng_state() if self.within_fit else None
        data = [feed.state() for feed in feeds] if self.within_fit else []
        call.refresh()
        before, metrics.stage = metrics.stage, self.results
        self.results.reset()
        complete, self._begun = True, 0
        with evaluating(trainer, stage, zero_grad=self._frees_gradients):
            call(f"on_{stage}_start")
            call(f"on_{stage}_epoch_start")
            for number, feed in enumerate(feeds):
                metrics.loader = number if len(feeds) > 1 else None
                complete = self._run_loader(number, feed, limit, several=len(feeds) > 1)
                if not complete:
                    break
            metrics.loader = metrics.batch = None
            complete = complete and not self._leaves(LAST)
            if complete:
                self._finish(len(feeds))
                call(f"on_{stage}_end")
        metrics.stage = before
        self.results.reset()
        if trainer.strategy.virtual_ranks:
            seed_between(trainer.loop_state, "evaluated", stage)
        if not complete:
            set_rng_state(rng)  # type: ignore[arg-type]
            for feed, state in zip(feeds, data, strict=True):
                feed.load_state(state)
        call.refresh()
        return complete

    @property
    def _frees_gradients(self) -> bool:
        return self.within_fit and not self.trainer.accumulating and not self.trainer.sanity_checking

    def _finish(self, loaders: int) -> None:
        trainer, metrics = self.trainer, self.trainer.metrics
        where = {"step": max(0, trainer.loop_state.stepped - 1), "epoch": trainer.loop_state.epoch}
        # Before the hook, so that it finds the epoch's values; after it, for what it logs itself.
        values = metrics.flush_epoch(self.results, **where)
        trainer.hooks(f"on_{self.stage}_epoch_end")
        values.update(metrics.flush_epoch(self.results, **where))
        self.found = [_of_loader(values, number) for number in range(loaders)] if loaders > 1 else [values]

    def _run_loader(self, number: int, feed: Feed, limit: int | None, *, several: bool) -> bool:
        trainer, metrics, stage = self.trainer, self.trainer.metrics, self.stage
        call = trainer.hooks
        step = eval_step(trainer, f"{stage}_step", several=several)
        together = trainer.strategy.forward_is_collective
        with contextlib.closing(feed.iterate(0, 0)) as batches:  # type: ignore[type-var]
            index, opens = 0, True
            for plan, raw in batches:
                if index == limit:
                    break
                if (
                    opens
                ):  # virtual ranks of one process share their number, which is the same on all processes
                    self._begun += 1
                    if self._leaves(self._begun):
                        return False
                opens = plan.counts > 0
                if (
                    not plan.padding or together
                ):  # else: nothing is collective, and no sample must be counted twice
                    if plan.virtual is not None:
                        seed_evaluation(trainer.loop_state, stage, number, index, plan)
                    metrics.enter(plan.virtual, self._begun)
                    trainer.is_last_batch = plan.last
                    batch = self._transfer(raw, number)
                    metrics.batch, metrics.weight = batch, 0 if plan.padding else None
                    args = (batch, index, number) if several else (batch, index)
                    call(f"on_{stage}_batch_start", *args)
                    output = step(batch, index, number)
                    call(f"on_{stage}_batch_end", output, *args)
                    metrics.enter(None, self._begun)
                index += plan.counts
                if opens and (not plan.padding or plan.virtual is not None):
                    self._flush_step()
        return True

    def _leaves(self, number: int) -> bool:
        """Whether all ranks are on their way out, and may leave this validation for after the resume."""
        trainer = self.trainer
        if not self.within_fit or self.trainer.accumulating or trainer.sanity_checking:
            return False
        return trainer.stop.begins(trainer.loop_state.total_batches, number)  # type: ignore[no-any-return]

    def _flush_step(self) -> None:
        """Of evaluation steps only what asks for on_step=True goes out, every log_every_n_steps batches."""
        self._steps += 1
        if self.results.has_steps and self._steps % self.trainer.log_every_n_steps == 0:
            self.trainer.metrics.flush_step(step=self._steps - 1, epoch=self.trainer.loop_state.epoch)


def eval_step(trainer: Trainer, name: str, *, several: bool) -> Step:
    """`step(batch, index, number of the loader)`; the number is for modules that take it, where there are several."""
    takes = positional(getattr(trainer.lightning_module, name))
    return make_step(trainer, trainer.hooks, name, min(takes, 3 if several else 2))


@contextlib.contextmanager
def evaluating(trainer: Trainer, stage: str, *, zero_grad: bool = False) -> Iterator[None]:
    """Evaluation mode, no gradients; afterwards every submodule has the mode that it had."""
    module = trainer.lightning_module
    modes = [(part, part.training) for part in module.modules()]
    if zero_grad:
        module.on_validation_model_zero_grad()
    quiet = (
        torch.inference_mode
        if trainer.inference_mode and trainer.strategy.allows_inference_mode
        else torch.no_grad
    )
    with quiet():
        getattr(module, f"on_{stage}_model_eval")()
        try:
            yield
        finally:
            getattr(module, f"on_{stage}_model_train")()
            for part, training in modes:
                part.training = training


def _of_loader(values: dict[str, float], number: int) -> dict[str, float]:
    """What one loader logged, and what was logged for all of them."""
    mine = f"/dataloader_idx_{number}"
    return {
        name: value for name, value in values.items() if name.endswith(mine) or "/dataloader_idx_" not in name
    }
