"""`Trainer(deterministic="elastic")`: the same weights, bit for bit, at any number of processes, also if it changes.

Every step is computed as V virtual ranks (`data.virtual`), each with generators that are seeded by the step and the virtual
rank; their gradients are added up along one tree (`optimization.fold`). docs/decisions/0008-elastic-determinism.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException
from trainyard.reproducibility import derived_seed, reseed
from trainyard_api.contract import Env

if TYPE_CHECKING:
    from trainyard.data.batching import Batching
    from trainyard.data.sampler import Batch
    from trainyard.loops.state import LoopState
    from trainyard.strategies.base import Strategy

_log = logging.getLogger("trainyard")

ELASTIC = "elastic"


def virtual_ranks(deterministic: Any, given: int | None, env: Mapping[str, str] = os.environ) -> int | None:
    """How many virtual ranks the Trainer's arguments, or the TrainingRun in their place, ask for; None for none.

    Raises MisconfigurationException.
    """
    said, count = env.get(Env.DETERMINISM, ""), env.get(Env.VIRTUAL_RANKS, "")
    if said not in ("", ELASTIC):
        raise MisconfigurationException(f"{Env.DETERMINISM}: {said!r} is not {ELASTIC!r}")
    if said:
        if not count.isdecimal() or int(count) < 1:
            raise MisconfigurationException(f"{Env.VIRTUAL_RANKS}: {count!r} is not a positive integer")
        if given is not None and given != int(count):
            _log.warning("Trainer(virtual_ranks=%s) gives way to the TrainingRun's %s", given, count)
        return int(count)
    if deterministic != ELASTIC:
        if given is not None:
            raise MisconfigurationException(
                "virtual_ranks: it says how a step is divided with deterministic='elastic'; give both, or none"
            )
        return None
    if given is None or isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise MisconfigurationException(
            f"virtual_ranks: {given!r} is not a positive integer; deterministic='elastic' wants to know into how many parts "
            "a step is divided, for good: as many as the most processes that the run will ever have, or more"
        )
    return given


def equip(strategy: Strategy, virtual: int | None) -> None:
    """Have `strategy` compute by virtual ranks. Raises MisconfigurationException where it cannot."""
    strategy.virtual_ranks = virtual
    if virtual is None:
        return
    if not strategy.takes_virtual_ranks:
        raise MisconfigurationException(
            f"deterministic='elastic': strategy {strategy.name!r} adds up gradients, or the parts of sharded sums, in an order "
            "that depends on the number of processes; use 'ddp', or a single device"
        )
    if strategy.layer_sync is not None:
        raise MisconfigurationException(
            "deterministic='elastic': sync_batchnorm computes over the batches of all processes at once, so it depends on "
            "their number; leave it out, or normalise within a sample (LayerNorm, GroupNorm)"
        )


def check_world(virtual: int, world: int) -> None:
    """Raises MisconfigurationException if there is nothing to do for some of the processes."""
    if world > virtual:
        raise MisconfigurationException(
            f"virtual_ranks: {virtual} virtual ranks are too few for {world} processes; start at most {virtual}. More "
            "virtual ranks would be another run, with other weights"
        )


def check_checkpoint(before: Batching, now: Batching) -> None:
    """Raises MisconfigurationException where a run that goes on with `now` cannot end as it would have.

    A run that was not elastic is so from here on.
    """
    if not before.virtual:
        return
    for name, was, is_ in (
        ("virtual_ranks", before.ranks, now.ranks),
        ("batch_size", before.batch_size, now.batch_size),
        ("accumulate_grad_batches", before.accumulate, now.accumulate),
    ):
        if was != is_:
            raise MisconfigurationException(
                f"{name}: {is_}, but the checkpoint is of a run with deterministic='elastic' and {was}: another one would "
                f"lead to other weights. Say {name}={was}, leave out deterministic='elastic', or begin a new run"
            )


def use_one_thread() -> None:
    """On the CPU sums are divided among threads: their number is part of the result, and torchrun's default for it depends
    on the number of processes. Whoever sets OMP_NUM_THREADS keeps it the same for all of the run."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


# ---- generators


def seed_batch(state: LoopState, plan: Batch) -> None:
    """Before anything of a batch that draws: transfer hooks, hooks, the forward pass."""
    reseed(derived_seed("virtual", state.seed, state.step, plan.virtual, plan.turn))


def seed_evaluation(state: LoopState, stage: str, loader: int, index: int, plan: Batch) -> None:
    """As `seed_batch`, for batch `index` of the loader with that number."""
    reseed(derived_seed("virtual", stage, state.seed, state.step, loader, index, plan.virtual))


def seed_between(state: LoopState, *what: object) -> None:
    """Where all processes do the same: hooks of steps and epochs, the optimizer."""
    reseed(derived_seed("between", state.seed, state.step, state.epoch, *what))
