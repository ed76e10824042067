"""What belongs to a completed step beside weights and optimizer states, which are the same until the next one changes them.

Batches are read, forward passes are run and hooks are called before the next change: they draw from the generators, move
the data on, add to the sums of the epoch, and change buffers. So all of that is kept from the moment at which the step
was complete, and goes into a checkpoint that is written later in the place of what there is by then.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.checkpoint.saving import Payload
from trainyard.core.module import LightningModule
from trainyard.core.portable import OWN
from trainyard.reproducibility import draws, portable
from trainyard.trainer import ckpt_layout
from trainyard.trainer.persistence import kept_by_rank, payload

if TYPE_CHECKING:
    from trainyard.loops.state import LoopState
    from trainyard.trainer.trainer import Trainer

_BEFORE_THE_NEXT_CHANGE = (
    "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Moment:
    """Copies: nothing of it changes any more. Made by `Moments.take`."""

    loop: LoopState
    whole: bool
    """All batches of the epoch are used."""
    drawn: dict[str, Any]
    own: dict[str, Any]
    """`persistence.kept_by_rank`."""
    buffers: dict[str, Any]
    callbacks: dict[str, Any]
    datamodule: dict[str, Any]
    groups: list[list[dict[str, Any]]]
    """By optimizer and group: all but the parameters, for a hook may set a learning rate."""

    @property
    def metrics(self) -> dict[str, float]:
        """As `persistence.scalars`."""
        return {n: float(v) for n, v in self.own["last"]["callback"].items() if v.numel() == 1}

    @property
    def word(self) -> str:
        """The same on all ranks whose shards make one checkpoint."""
        return f"{self.loop.step}/{self.loop.total_batches}/{int(self.loop.validates)}"


class Moments:
    """Of one fit."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._stateful = [c for c in trainer.callbacks if _overrides(c, "state_dict", Callback)]
        self._moving = [
            c
            for c in self._stateful
            if any(_overrides(c, name, Callback) for name in _BEFORE_THE_NEXT_CHANGE)
        ]

    def obstacle(self) -> str:
        """Why the state of a completed step could not be put together later; empty: it can."""
        from torch.nn import Module

        trainer = self._trainer
        module, strategy = trainer.lightning_module, trainer.strategy
        if strategy.gathers_state:
            return f"the strategy {strategy.name} gathers the state for a save, which takes all ranks"
        if _overrides(module, "on_save_checkpoint", LightningModule):
            return f"{type(module).__name__}.on_save_checkpoint may add what the unfinished step has changed"
        for callback in trainer.callbacks:
            if _overrides(callback, "on_save_checkpoint", Callback):
                return f"{type(callback).__name__}.on_save_checkpoint may need the other ranks"
        for name, part in module.named_modules():
            if type(part).get_extra_state is not Module.get_extra_state:
                return f"{name} ({type(part).__name__}) has an extra state, which a forward pass may change"
        return ""

    def take(self, *, validates: bool = False) -> Moment:
        """The present one. `validates`: the validation that belongs to it begins now, and is to be done anew."""
        trainer = self._trainer
        loop = dataclasses.replace(trainer.loop_state)
        batches = trainer.train_feed.batches
        whole = bool(loop.batches) and (
            trainer.is_last_batch or (batches is not None and loop.batches >= batches)
        )
        if validates:
            loop.validates, loop.validated = True, False
        datamodule = trainer.datamodule
        return Moment(
            loop=loop, whole=whole, drawn=draws(), own=_copied(kept_by_rank(trainer)),
            buffers={name: b.detach().clone() for name, b in trainer.lightning_module.named_buffers()},
            callbacks={c.state_key: _copied(c.state_dict()) for c in (self._stateful if validates else self._moving)},
            datamodule={} if datamodule is None else _copied(datamodule.state_dict() or {}),
            groups=[[_settings(g) for g in optimizer.param_groups] for optimizer in trainer.optimizers],
        )  # fmt: skip

    def payload(self, moment: Moment) -> Payload:
        """This rank's part of a checkpoint of `moment`. Raises RuntimeError when it cannot be put together."""
        trainer = self._trainer
        found = payload(trainer)
        checkpoint, loop = found.checkpoint, moment.loop
        lightnings = dataclasses.replace(loop)
        if moment.whole:
            lightnings.next_epoch()
        automatic = trainer.lightning_module.automatic_optimization
        checkpoint["epoch"], checkpoint["global_step"] = loop.epoch, loop.step
        checkpoint["loops"] = ckpt_layout.loops(lightnings, automatic=automatic)
        checkpoint[OWN]["loop"], checkpoint[OWN]["plateau"] = loop.state_dict(), False
        for key, state in moment.callbacks.items():
            checkpoint["callbacks"].pop(key, None)
            if state:
                checkpoint["callbacks"][key] = state
        if moment.datamodule:
            checkpoint[type(trainer.datamodule).__qualname__] = moment.datamodule
        weights = checkpoint["state_dict"]
        weights.update({name: value for name, value in moment.buffers.items() if name in weights})
        for state, groups in zip(checkpoint["optimizer_states"], moment.groups, strict=True):
            if len(state["param_groups"]) != len(groups):
                raise RuntimeError("a hook has changed what the optimizer trains since the last step")
            state["param_groups"] = [
                {**group, **kept} for group, kept in zip(state["param_groups"], groups, strict=True)
            ]
        return dataclasses.replace(found, own={"rng": portable(moment.drawn), **moment.own})


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) for k, v in group.items() if k not in ("params", "param_names")}


def _copied(value: Any) -> Any:
    """Of tensors, containers and primitives; anything else by deepcopy."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (int, float, str, bool, type(None)):
        return value
    if type(value) is dict:
        return {k: _copied(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(v) for v in value)
    return copy.deepcopy(value)


def _overrides(found: Any, name: str, base: type) -> bool:
    return getattr(getattr(found, name), "__func__", None) is not getattr(base, name)
