"""How a run takes back what a checkpoint holds (see `persistence`): of the engine, of a file of ours, of Lightning's."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointMismatch
from trainyard.checkpoint.snapshot import load_model, load_optimizers
from trainyard.loops.state import LoopState
from trainyard.optimization.schedulers import step_schedulers
from trainyard.reproducibility import derived_seed, reseed, set_rng_state
from trainyard.trainer import ckpt_layout
from trainyard.trainer.ckpt_errors import WeightsOnlyCheckpoint
from trainyard.trainer.ckpt_layout import FORMAT, LAST_LOGGED, SCALER
from trainyard.trainer.ckpt_source import Source, from_engine

if TYPE_CHECKING:
    from trainyard.checkpoint.resume import Loaded
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


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
        for name in LAST_LOGGED:
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
        if state.mid_epoch and source.ranks:
            trainer.metrics.load_moved([rank["sums"] for rank in source.ranks])
        return
    if state.mid_epoch:
        trainer.metrics.load_state_dict(trainer.lightning_module, own["sums"])
    _restore_data(trainer, own)
    if trainer.own_buffers is not None:
        trainer.own_buffers.load_state(own.get("buffers", {}))
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
