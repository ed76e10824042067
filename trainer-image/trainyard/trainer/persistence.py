"""What a checkpoint of a fit holds, and how a fit takes it back. Keys as in Lightning's `.ckpt` where it has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointMismatch
from trainyard.checkpoint.snapshot import load_model, load_optimizers
from trainyard.loops.state import LoopState
from trainyard.reproducibility import derived_seed, reseed, rng_state, set_rng_state

if TYPE_CHECKING:
    from trainyard.checkpoint.resume import Loaded
    from trainyard.trainer.trainer import Trainer

FORMAT = 1


def payload(trainer: Trainer) -> dict[str, Any]:
    """Rank 0's has everything, the others' what only they know: their generators and running sums.

    The hooks run on all ranks, because they may hold collectives, and leave the generators as they were.
    """
    rng = rng_state()
    module, datamodule = trainer.lightning_module, trainer.datamodule
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "state_dict": module.state_dict(),
        "optimizer_states": [o.state_dict() for o in trainer.optimizers],
        "lr_schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
        "callbacks": {c.state_key: state for c in trainer.callbacks if (state := c.state_dict())},
        "loops": {"fit_loop": trainer.loop_state.state_dict()},
    }
    if datamodule is not None:
        checkpoint[type(datamodule).__qualname__] = datamodule.state_dict()
    for callback in trainer.callbacks:
        callback.on_save_checkpoint(trainer, module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    set_rng_state(rng)
    own = {"rng": rng, "logged": trainer.metrics.train.state_dict()}
    return {"format": FORMAT, "checkpoint": checkpoint if trainer.is_global_zero else {}, "rank": own}


def restore_module(trainer: Trainer, loaded: Loaded) -> None:
    """Weights, callbacks, data module, position. Raises CheckpointMismatch."""
    if loaded.main.get("format") != FORMAT:
        raise CheckpointMismatch(
            f"the checkpoint {loaded.uri} has format {loaded.main.get('format')!r}, this version of trainyard reads "
            f"{FORMAT}; use the version that wrote it, or start a new run"
        )
    checkpoint, module = loaded.main["checkpoint"], trainer.lightning_module
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, module, checkpoint)
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    module.on_load_checkpoint(checkpoint)
    load_model(module, checkpoint["state_dict"], loaded.uri)
    datamodule = trainer.datamodule
    if datamodule is not None and (state := checkpoint.get(type(datamodule).__qualname__)):
        datamodule.load_state_dict(state)
    trainer.loop_state = LoopState.from_state(checkpoint["loops"]["fit_loop"])


def restore_optimizers(trainer: Trainer, loaded: Loaded) -> None:
    """Once there are optimizers. Raises CheckpointMismatch."""
    checkpoint = loaded.main["checkpoint"]
    load_optimizers(trainer.optimizers, checkpoint["optimizer_states"], loaded.uri)
    schedulers = [c.scheduler for c in trainer.lr_scheduler_configs]
    load_optimizers(schedulers, checkpoint["lr_schedulers"], loaded.uri, "scheduler")
    trainer.precision_plugin.load_state_dict(checkpoint["precision"])


def restore_rank(trainer: Trainer, loaded: Loaded) -> None:
    """This rank's generators and running sums: right before the first batch, whatever was drawn until then.

    With another world size there is no such rank, or it was another share of the work: then the generators start from
    a seed that depends on (seed, step, rank), and the running sums of the epoch begin anew.
    """
    record, world = loaded.record, trainer.world_size
    if record is not None and record.world_size == world and "rank" in loaded.own:
        own = loaded.own["rank"]
        if trainer.loop_state.mid_epoch:
            trainer.metrics.train.load_state_dict(own["logged"], trainer.strategy.device)
        set_rng_state(own["rng"])
    else:
        state = trainer.loop_state
        reseed(derived_seed("resume", state.seed, state.step, trainer.global_rank))
