"""What makes up a global batch, as the run began: a run that goes on with another number of ranks keeps it.

The rule. With the same batch size and accumulation as before, a step has the samples that it had, at any number of
ranks: n ranks of A batches each become m ranks of n*A/m batches where that is a whole number, and else of the next whole
number of batches, made smaller so that the samples are the same; the weights of their losses make the gradient that of
the mean over them. What can only be iterated comes in batches that nobody can cut: there the number of batches is
rounded up. A batch size or accumulation that is another one than before is what somebody wants now: it counts as it is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from trainyard.determinism import check_checkpoint

if TYPE_CHECKING:
    from trainyard.data.feed import Feed
    from trainyard.loops.state import LoopState
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """Part of `LoopState`, and so kept in checkpoints."""

    ranks: int
    """That the run began with, or had when its batches were last changed; virtual ones where there are such."""
    batch_size: int | None
    """Of the training DataLoader; None if it does not say."""
    accumulate: int
    """Trainer(accumulate_grad_batches=...)."""
    counted_at: int
    """Ranks by which the numbers of batches in `LoopState` are counted."""
    virtual: bool = False
    """Whether they are virtual ranks: then nothing of this may change."""
    loaded: bool = False
    """From a checkpoint: not yet compared with what this process was given."""

    @property
    def samples(self) -> int | None:
        """Of a step, over all ranks."""
        return None if self.batch_size is None else self.ranks * self.batch_size * self.accumulate

    def after(self, before: Batching) -> Batching:
        """What a run goes on with that is called with `self`, from a checkpoint with `before`."""
        same = (self.batch_size, self.accumulate) == (before.batch_size, before.accumulate)
        return replace(self, ranks=before.ranks) if same else self

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Batching:
        """Of what dataclasses.asdict gave."""
        size = state["batch_size"]
        return cls(
            ranks=int(state["ranks"]), batch_size=None if size is None else int(size),
            accumulate=int(state["accumulate"]), counted_at=int(state["counted_at"]),
            virtual=bool(state["virtual"]), loaded=True,
        )  # fmt: skip


def settle(trainer: Trainer, feed: Feed) -> None:
    """Tell `feed` what a global batch is, once the checkpoint is known, or that there is none. May be called again.

    Raises MisconfigurationException where a run with virtual ranks is to go on otherwise than it began.
    """
    state, strategy = trainer.loop_state, trainer.strategy
    before, virtual = state.batching, strategy.virtual_ranks
    ranks = virtual or strategy.distributed_sampler_kwargs["num_replicas"]
    fresh = before is None or before.loaded
    now = Batching(
        ranks=ranks, batch_size=getattr(feed.given, "batch_size", None), counted_at=ranks, virtual=bool(virtual),
        # A callback may have changed it since.
        accumulate=trainer.accumulate_grad_batches if fresh or before is None else before.accumulate,
    )  # fmt: skip
    if virtual and before is not None and before.loaded:
        check_checkpoint(before, now)
    if before is not None and not virtual:
        now = now.after(before)
    feed.origin = None if virtual else now.ranks
    state.batching = now
    if before is None or not before.loaded:
        return
    if before.counted_at != now.counted_at:
        recount(state, feed)
    if (line := announcement(now, before, feed)) and trainer.is_global_zero:
        _log.info("%s", line)


def announcement(now: Batching, before: Batching, feed: Feed) -> str:
    """One line for the log where the number of ranks, or a step's samples, are others than they were; else empty."""
    if now.ranks == before.ranks and now.counted_at != before.counted_at:
        batches = feed.accumulate * feed.scale
        then = f"{now.ranks} ranks x {_batches(feed.accumulate)} when the run began"
        here = f"{now.counted_at} ranks x {_batches(batches)}"
        total = now.ranks * feed.accumulate
        if batches * now.counted_at == total:
            return f"the global batch stays as it is: {here}; {then}"
        if hasattr(feed, "plan") and now.samples is not None:
            return f"the global batch stays as it is, {now.samples} samples: {here}, smaller than {now.batch_size}; {then}"
        return f"the global batch is {batches * now.counted_at} batches instead of {total}: {here}; {then}"
    if now.samples != before.samples and None not in (now.samples, before.samples):
        return (
            f"the global batch is {now.samples} samples from now on; it was {before.samples}, with another batch size or "
            "accumulation"
        )
    return ""


def _batches(count: Fraction | int) -> str:
    return f"{count} batch" if count == 1 else f"{count} batches"


def recount(state: LoopState, feed: Feed) -> None:
    """Have `state` count batches by the ranks of now. Samples and steps mean the same at any number of them."""
    whole, left = feed.batches, feed.batches_from(state.samples)
    if whole is None or left is None:
        return
    state.batches = whole - left
    state.total_batches = state.epoch * whole + state.batches
