"""From the loaders that a script, a module or a data module gives to the feeds of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.core.hooks import DataHooks
from trainyard.data.batching import settle
from trainyard.data.feed import Feed
from trainyard.data.make import make_feed
from trainyard.determinism import check_world
from trainyard.errors import MisconfigurationException
from trainyard.utilities.combined_loader import CombinedLoader, flatten

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer


def data_hook(trainer: Trainer, name: str) -> Any:
    """The data module's hook if it overrides it, else the module's."""
    datamodule = trainer.datamodule
    if datamodule is not None and getattr(type(datamodule), name) is not getattr(DataHooks, name):
        return getattr(datamodule, name)
    return getattr(trainer.lightning_module, name)


def prepare_data(trainer: Trainer) -> None:
    """On one process per node, or on one of all, while the others wait."""
    for owner in (trainer.datamodule, trainer.lightning_module):
        if owner is None:
            continue
        first = trainer.local_rank == 0 if owner.prepare_data_per_node else trainer.is_global_zero
        if first:
            owner.prepare_data()
    trainer.strategy.barrier()


def train_feed(trainer: Trainer, given: Any) -> Feed:
    """Raises MisconfigurationException if there is nothing to train on."""
    if given is None:
        hook = data_hook(trainer, "train_dataloader")
        if getattr(hook, "__func__", None) is DataHooks.train_dataloader:
            raise MisconfigurationException(
                "no training data: give fit a DataLoader, or define train_dataloader"
            )
        given = hook()
    feed = _feed(trainer, given, "train")
    feed.accumulate = trainer.accumulate_grad_batches
    settle(trainer, feed)
    if feed.batches == 0:
        raise MisconfigurationException(
            "the training data has no batch; check its length, drop_last and limit_train_batches"
        )
    return feed


def eval_feeds(trainer: Trainer, given: Any, stage: str) -> list[Feed]:
    """For `stage` "val", "test" or "predict"; empty if there is no loader, or its limit is 0. Each sample exactly once.

    A collection is gone through loader by loader; a CombinedLoader of another mode than "sequential" is one feed.
    """
    if getattr(trainer, f"limit_{stage}_batches") == 0:
        return []
    name = f"{stage}_dataloader"
    if given is None:
        hook = data_hook(trainer, name)
        if getattr(hook, "__func__", None) is getattr(DataHooks, name):
            return []
        given = hook()
    if isinstance(given, CombinedLoader):
        loaders = given.flattened if given.mode == "sequential" else [given]
    else:
        loaders = [] if given is None else flatten(given)
    return [_feed(trainer, loader, stage) for loader in loaders]


def _feed(trainer: Trainer, loader: Any, stage: str) -> Feed:
    overfits = bool(trainer.overfit_batches) and stage in ("train", "val")
    limit = trainer.overfit_batches if overfits else getattr(trainer, f"limit_{stage}_batches")
    share = trainer.strategy.distributed_sampler_kwargs
    virtual = None if stage == "predict" else trainer.strategy.virtual_ranks
    if virtual:
        check_world(virtual, trainer.world_size)
    feed = make_feed(
        loader, rank=share["rank"], world=share["num_replicas"], seed=trainer.loop_state.seed, limit=limit,
        resample=trainer.use_distributed_sampler, what=stage, in_order=overfits and str(trainer.state.fn) == "fit",
        virtual=virtual,
    )  # fmt: skip
    if feed.batches == 0 and isinstance(limit, float) and limit > 0:
        name = "overfit_batches" if overfits else f"limit_{stage}_batches"
        raise MisconfigurationException(
            f"{name}={limit} of this {stage} loader is less than one batch; give a larger fraction, or a number"
        )
    return feed
