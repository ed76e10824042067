"""What a checkpoint of a run holds. How a run takes it back is in `restoring`.

There is one content, in Lightning's layout (`ckpt_layout`), for both kinds of checkpoint: the single `.ckpt` file, and
the engine's shards. What only a rank knows (its generators, its running sums) is in that rank's shard, or, in a file,
for all ranks under the key "trainyard" beside Lightning's.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.payload import Payload
from trainyard.checkpoint.snapshot import foreign
from trainyard.core.portable import OWN
from trainyard.data.once import warn_once
from trainyard.loggers.session import states
from trainyard.loops.state import LoopState
from trainyard.reproducibility import rng_state, set_rng_state
from trainyard.trainer import ckpt_file, ckpt_layout
from trainyard.trainer.ckpt_layout import FORMAT, LAST_LOGGED, SCALER
from trainyard.trainer.ckpt_source import raise_together
from trainyard.trainer.sharding import optimizer_names, replicated

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")

# ---- out


def dump(trainer: Trainer, weights_only: bool = False, *, whole: bool = True) -> dict[str, Any]:
    """Collective: the checkpoint without what only ranks know. Whole on rank 0; the others' must not be used.

    Not `whole`: sharded tensors are DTensors, and each rank's are of use.

    The hooks run on all ranks, because they may hold collectives, and leave the generators as they were.
    """
    rng = rng_state()
    module, datamodule, strategy = trainer.lightning_module, trainer.datamodule, trainer.strategy
    model_state = strategy.model_state if whole else strategy.own_model_state
    optimizer_state = strategy.optimizer_state if whole else strategy.own_optimizer_state
    state, plateau = resume_state(trainer)
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": ckpt_layout.LAYOUT_VERSION,
        "state_dict": model_state(module),
        "loops": ckpt_layout.loops(_for_lightning(trainer, state), automatic=module.automatic_optimization),
        OWN: {
            "format": FORMAT,
            "loop": state.state_dict(),
            "plateau": plateau,
            "world_size": trainer.world_size,
            "loggers": states(trainer.loggers) if trainer.is_global_zero else [],
        },
    }
    if not weights_only:
        checkpoint["callbacks"] = {c.state_key: s for c in trainer.callbacks if (s := c.state_dict())}
        checkpoint["optimizer_states"] = [
            optimizer_state(module, optimizer) for optimizer in trainer.optimizers
        ]
        checkpoint[OWN]["optimizer_names"] = optimizer_names(trainer)
        checkpoint["lr_schedulers"] = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
        if precision := trainer.precision_plugin.state_dict():
            checkpoint[SCALER] = precision
    for owner in (module, datamodule):
        if owner is not None and callable(add := getattr(owner, "_dump_hparams", None)):
            add(checkpoint)
    if datamodule is not None and (kept := datamodule.state_dict()):
        checkpoint[type(datamodule).__qualname__] = kept
    if not weights_only:
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    set_rng_state(rng)
    return checkpoint


def of_rank(trainer: Trainer) -> dict[str, Any]:
    """What only this rank knows: its generators, the sums of its epoch, and what it has logged last."""
    return {"rng": rng_state(), **kept_by_rank(trainer)}


def kept_by_rank(trainer: Trainer) -> dict[str, Any]:
    """`of_rank` but for the generators."""
    metrics, fits = trainer.metrics, trainer.state.fn == "fit"
    return {
        "data": trainer.train_feed.state() if fits else {},
        "val_data": [feed.state() for feed in trainer.val_feeds] if fits else [],
        "sums": metrics.state_dict(trainer.lightning_module),
        "buffers": trainer.own_buffers.state() if fits and trainer.own_buffers is not None else {},
        "last": {
            "callback": metrics.callback_metrics(),
            **{name: dict(getattr(metrics, name)) for name in LAST_LOGGED},
        },
    }


def resume_state(trainer: Trainer) -> tuple[LoopState, bool]:
    """Where a run goes on that resumes from a checkpoint of this moment, and whether it then owes the schedulers that
    want a metric their step.

    ModelCheckpoint saves inside of hooks, when what belongs to the batch or epoch is not all done.
    """
    state, hook = dataclasses.replace(trainer.loop_state), trainer.metrics.hook
    if hook == "on_train_batch_end" and trainer.val_feeds:
        state.validates |= trainer.schedule.validates_within(
            state, batches=trainer.train_feed.batches, last=trainer.is_last_batch, scale=trainer.train_feed.scale,
            counts=trainer.batch_plan.counts,
        )  # fmt: skip
    if hook != "on_train_epoch_end":
        return state, False
    whole = _all_batches_used(trainer, state)
    if not whole and trainer.schedule.done_in_epoch(state, should_stop=trainer.should_stop):
        return state, False  # the epoch is not over, and the resumed run goes on with it
    state.next_epoch()
    return state, True


def _for_lightning(trainer: Trainer, state: LoopState) -> LoopState:
    """Lightning does not keep what was logged: from behind an epoch's last batch it would go on with an end of the epoch
    at which EarlyStopping misses its metric. There it goes on with the next epoch."""
    if not (state.batches and _all_batches_used(trainer, state)):
        return state
    state = dataclasses.replace(state)
    state.next_epoch()
    return state


def _all_batches_used(trainer: Trainer, state: LoopState) -> bool:
    batches = trainer.train_feed.batches
    return trainer.is_last_batch or (batches is not None and state.batches >= batches)


def payload(trainer: Trainer) -> Payload:
    """This rank's part for the engine. Collective where a hook of the user's or a strategy's gathering is."""
    checkpoint = dump(trainer, whole=False)
    return Payload(checkpoint=checkpoint, own=of_rank(trainer), replicated=replicated(trainer, checkpoint))


def scalars(trainer: Trainer) -> dict[str, float]:
    """What was logged last, for the commit record: what retention chooses the best by."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if getattr(value, "numel", lambda: 1)() == 1
    }


def dump_for_file(trainer: Trainer, weights_only: bool) -> dict[str, Any]:
    """Collective: everything in one dict, on rank 0."""
    checkpoint = dump(trainer, weights_only)
    if not weights_only:
        if trainer.accumulating and trainer.is_global_zero:
            warn_once(
                "a checkpoint in the middle of an accumulation has no gradients: a run that resumes from it leaves out "
                "the batches since the last optimizer step"
            )
        ranks = trainer.strategy.peers.gather(_to_text(of_rank(trainer)))
        if trainer.is_global_zero:
            checkpoint[OWN]["ranks"] = [_from_text(text) for text in ranks]
    return checkpoint


def _to_text(value: Any) -> str:
    """For `Peers.gather`, which carries JSON."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _from_text(text: str) -> Any:
    import torch

    return torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)


# ---- a file


def save(
    trainer: Trainer, filepath: str | os.PathLike[str], weights_only: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Collective: `trainer.save_checkpoint`. When it returns, on any rank, the file is there, whole.

    Raises RuntimeError without a module; OSError or CheckpointError on all ranks if rank 0 cannot write.
    """
    checkpoint = dump_for_file(trainer, weights_only)
    error: Exception | None = None
    if trainer.is_global_zero:
        if odd := foreign(checkpoint):
            _log.warning(
                "%s can only be loaded with weights_only=False: %s", filepath,
                ", ".join(f"{where} is a {kind}" for where, kind in odd.items()),
            )  # fmt: skip
        try:
            ckpt_file.write(checkpoint, filepath, storage_options)
        except Exception as problem:
            error = problem
    raise_together(trainer.strategy.peers, error)
