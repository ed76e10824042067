"""What a checkpoint of a run holds, and how a run takes it back.

There is one content, in Lightning's layout (`ckpt_layout`), for both kinds of checkpoint: the single `.ckpt` file, and
the engine's shards. What only a rank knows (its generators, its running sums) is in that rank's shard, or, in a file,
for all ranks under the key "trainyard" beside Lightning's.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointMismatch
from trainyard.checkpoint.snapshot import foreign, load_model, load_optimizers
from trainyard.core.portable import OWN
from trainyard.loggers.session import states
from trainyard.loops.state import LoopState
from trainyard.optimization.schedulers import step_schedulers
from trainyard.reproducibility import derived_seed, reseed, rng_state, set_rng_state
from trainyard.trainer import ckpt_file, ckpt_layout
from trainyard.trainer.ckpt_errors import WeightsOnlyCheckpoint
from trainyard.trainer.ckpt_source import Source, from_engine, raise_together

if TYPE_CHECKING:
    from trainyard.checkpoint.resume import Loaded
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")

FORMAT = 2
"""Of our part."""
_LAST = ("logged", "bar", "validation")
SCALER = "MixedPrecision"
"""Lightning's key for the state of the gradient scaler."""


# ---- out


def dump(trainer: Trainer, weights_only: bool = False) -> dict[str, Any]:
    """Collective: the checkpoint without what only ranks know. Whole on rank 0; the others' must not be used.

    The hooks run on all ranks, because they may hold collectives, and leave the generators as they were.
    """
    rng = rng_state()
    module, datamodule = trainer.lightning_module, trainer.datamodule
    state, plateau = resume_state(trainer)
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": ckpt_layout.LAYOUT_VERSION,
        "state_dict": trainer.strategy.model_state(module),
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
            trainer.strategy.optimizer_state(module, optimizer) for optimizer in trainer.optimizers
        ]
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
    metrics, fits = trainer.metrics, trainer.state.fn == "fit"
    return {
        "rng": rng_state(),
        "data": trainer.train_feed.state() if fits else {},
        "val_data": [feed.state() for feed in trainer.val_feeds] if fits else [],
        "sums": metrics.state_dict(trainer.lightning_module),
        "last": {
            "callback": metrics.callback_metrics(),
            **{name: dict(getattr(metrics, name)) for name in _LAST},
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
            state, batches=trainer.train_feed.batches, last=trainer.is_last_batch
        )
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


def payload(trainer: Trainer) -> dict[str, Any]:
    """Collective: this rank's shard for the engine."""
    checkpoint = dump(trainer)
    return {
        "format": FORMAT,
        "checkpoint": checkpoint if trainer.is_global_zero else {},
        "rank": of_rank(trainer),
    }


def dump_for_file(trainer: Trainer, weights_only: bool) -> dict[str, Any]:
    """Collective: everything in one dict, on rank 0."""
    checkpoint = dump(trainer, weights_only)
    if not weights_only:
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


# ---- back in


def restore_module(trainer: Trainer, loaded: Loaded | Source, *, position: bool = True) -> None:
    """Weights, data module, callbacks and, unless `position` is False, where the fit is. Raises CheckpointMismatch.

    In Lightning's order: the module's hook may change the checkpoint before its weights are loaded.
    """
    source = _source(trainer, loaded)
    checkpoint, module = source.checkpoint, trainer.lightning_module
    module.on_load_checkpoint(checkpoint)
    strict = module.strict_loading
    load_model(
        module, checkpoint["state_dict"], source.uri, strict=strict,
        load=lambda state: trainer.strategy.load_model_state(module, state, strict=strict),
    )  # fmt: skip
    datamodule = trainer.datamodule
    if datamodule is not None and (state := checkpoint.get(type(datamodule).__qualname__)):
        datamodule.load_state_dict(state)
    _restore_callbacks(trainer, checkpoint, source.uri)
    if position:
        trainer.loop_state = _position(trainer, source)


def restore_optimizers(trainer: Trainer, loaded: Loaded | Source) -> None:
    """Once there are optimizers. Raises CheckpointMismatch, WeightsOnlyCheckpoint."""
    source = _source(trainer, loaded)
    checkpoint, module, strategy = source.checkpoint, trainer.lightning_module, trainer.strategy
    if "optimizer_states" not in checkpoint:
        raise WeightsOnlyCheckpoint(
            f"the checkpoint {source.uri} has weights only, so no fit can go on from it; load it with "
            f"{type(module).__name__}.load_from_checkpoint, and fit without ckpt_path"
        )
    load_optimizers(
        trainer.optimizers, checkpoint["optimizer_states"], source.uri,
        load=lambda optimizer, state: strategy.load_optimizer_state(module, optimizer, state),
    )  # fmt: skip
    schedulers = [c.scheduler for c in trainer.lr_scheduler_configs]
    load_optimizers(schedulers, checkpoint["lr_schedulers"], source.uri, "scheduler")
    # Lightning 1.x had another name for it.
    scaler = checkpoint.get(SCALER) or checkpoint.get("native_amp_scaling_state")
    if scaler:
        trainer.precision_plugin.load_state_dict(scaler)
    if source.first is not None:
        last = (source.rank or source.first)["last"]
        trainer.metrics.callback.update(last["callback"])
        for name in _LAST:
            getattr(trainer.metrics, name).update(last[name])
    if (source.own or {}).get("plateau"):
        state = trainer.loop_state
        state.epoch -= 1  # of the epoch that has just ended
        step_schedulers(trainer, "epoch", plateau=True)
        state.epoch += 1


def restore_rank(trainer: Trainer, loaded: Loaded | Source) -> None:
    """This rank's generators, running sums and data: right before the first batch, whatever was drawn until then.

    With another world size there is no such rank, or it was another share of the work: then the generators start from
    a seed that depends on (seed, step, rank), and the running sums of the epoch begin anew.
    """
    source, state = _source(trainer, loaded), trainer.loop_state
    own = source.rank
    if own is None:
        reseed(derived_seed("resume", state.seed, state.step, trainer.global_rank))
        if source.first is not None:
            _restore_data(trainer, source.first, moved=True)
        return
    if state.mid_epoch:
        trainer.metrics.load_state_dict(trainer.lightning_module, own["sums"])
    _restore_data(trainer, own)
    set_rng_state(own["rng"])


def _restore_data(trainer: Trainer, rank: dict[str, Any], *, moved: bool = False) -> None:
    trainer.train_feed.load_state(rank["data"], moved=moved)
    if len(rank["val_data"]) == len(trainer.val_feeds):
        for feed, state in zip(trainer.val_feeds, rank["val_data"], strict=True):
            feed.load_state(state, moved=moved)


def _source(trainer: Trainer, loaded: Loaded | Source) -> Source:
    source = loaded if isinstance(loaded, Source) else from_engine(loaded, trainer.world_size)
    if source.own is not None and source.own.get("format") != FORMAT:
        raise CheckpointMismatch(
            f"the checkpoint {source.uri} has format {source.own.get('format')!r}, this version of trainyard reads "
            f"{FORMAT}; use the version that wrote it, or start a new run"
        )
    return source


def _restore_callbacks(trainer: Trainer, checkpoint: dict[str, Any], uri: str) -> None:
    states = checkpoint.get("callbacks")
    if states is None:
        return
    missing = sorted(set(states) - {c.state_key for c in trainer.callbacks})
    if missing and trainer.is_global_zero:
        _log.warning(
            "%s has the state of callbacks that this Trainer does not have: %s", uri, ", ".join(missing)
        )
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
    for callback in trainer.callbacks:
        if state := states.get(callback.state_key):
            callback.load_state_dict(copy.deepcopy(state))


def _position(trainer: Trainer, source: Source) -> LoopState:
    if source.own is not None:
        return LoopState.from_state(source.own["loop"])
    try:
        state = ckpt_layout.position(source.checkpoint)
    except KeyError as error:
        raise CheckpointMismatch(
            f"the checkpoint {source.uri} has no {error} where Lightning 2 has it, so it does not say where its run was; "
            "bring it up to date with `python -m lightning.pytorch.utilities.upgrade_checkpoint`, or load its weights "
            "with load_from_checkpoint"
        ) from error
    state.seed = trainer.loop_state.seed
    lost = "its generators and its order of the samples are not in the file"
    if state.batches:
        _to_samples(trainer, state)
        lost += f", so the epoch goes on after {state.batches} batches of an order of our own"
    if trainer.is_global_zero:
        _log.warning("%s was written by Lightning: the run cannot go on exactly, for %s", source.uri, lost)
    return state


def _to_samples(trainer: Trainer, state: LoopState) -> None:
    """From a number of batches to one of samples, at a point where the optimizer has stepped."""
    feed = trainer.train_feed
    if feed.batches is not None and state.batches >= feed.batches:
        state.next_epoch()
        return
    state.batches -= state.batches % trainer.accumulate_grad_batches
    state.samples = feed.position(state.batches)
