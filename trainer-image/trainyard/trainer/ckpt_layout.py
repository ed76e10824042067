"""Lightning's layout of the position of a run in a `.ckpt` file, to and from ours.

Lightning keeps counters of what is ready, started, processed and completed, for each of its loops
(`lightning.pytorch.loops.progress`; the layout is that of 2.0 and later). We keep one position, `LoopState`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainyard.loops.state import LoopState

LAYOUT_VERSION = "2.6.6"
"""The `pytorch-lightning_version` that we write: the one that the layout was compared with."""
FORMAT = 2
"""Of our part of a checkpoint, under the key `portable.OWN`."""
SCALER = "MixedPrecision"
"""Lightning's key for the state of the gradient scaler."""
LAST_LOGGED = ("logged", "bar", "validation")
"""Attributes of `Metrics` that hold the newest numbers."""


def _counts(number: int, *, ready: int | None = None, stages: int = 4) -> dict[str, int]:
    """`number` completed; `ready` (and started) if that is more."""
    begun = number if ready is None else ready
    if stages == 2:
        return {"ready": begun, "completed": number}
    if stages == 3:
        return {"ready": begun, "completed": number, "started": begun}
    return {"ready": begun, "completed": number, "started": begun, "processed": number}


def _batches(total: int, current: int) -> dict[str, Any]:
    return {"total": _counts(total), "current": _counts(current), "is_last_batch": False}


def fit_loop(state: LoopState, *, automatic: bool) -> dict[str, Any]:
    """The state of Lightning's fit loop at `state`, a point between two batches or two epochs.

    `automatic`: which of the two optimization loops has made the steps. In the middle of an epoch Lightning has it
    started and not processed.
    """
    epoch, step = state.epoch, state.step
    begun = epoch + bool(state.batches)
    auto, manual = (step, 0) if automatic else (0, step)
    return {
        "state_dict": {},
        "epoch_progress": {"total": _counts(epoch, ready=begun), "current": _counts(epoch, ready=begun)},
        "epoch_loop.state_dict": {"_batches_that_stepped": state.stepped},
        "epoch_loop.batch_progress": _batches(state.total_batches, state.batches),
        "epoch_loop.scheduler_progress": {
            "total": _counts(step, stages=2),
            "current": _counts(0, stages=2),
        },
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {
                "step": {"total": _counts(auto, stages=2), "current": _counts(0, stages=2)},
                "zero_grad": {"total": _counts(auto, stages=3), "current": _counts(0, stages=3)},
            }
        },
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": {
            "total": _counts(manual, stages=2),
            "current": _counts(0, stages=2),
        },
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.batch_progress": _batches(0, 0),
    }


def loops(state: LoopState, *, automatic: bool) -> dict[str, Any]:
    """The whole of `checkpoint["loops"]`."""
    return {
        "fit_loop": fit_loop(state, automatic=automatic),
        "validate_loop": {"state_dict": {}, "batch_progress": _batches(0, 0)},
        "test_loop": {"state_dict": {}, "batch_progress": _batches(0, 0)},
        "predict_loop": {
            "state_dict": {},
            "batch_progress": {"total": _counts(0), "current": _counts(0)},
        },
    }


def position(checkpoint: Mapping[str, Any]) -> LoopState:
    """Where the run was whose checkpoint Lightning wrote; `samples` and `seed` are not in it.

    Raises KeyError for a layout older than 2.0.
    """
    fit = checkpoint["loops"]["fit_loop"]
    epochs, progress = fit["epoch_progress"]["current"], fit["epoch_loop.batch_progress"]
    state = LoopState(
        epoch=int(epochs["processed"]),
        batches=int(progress["current"]["processed"]),
        total_batches=int(progress["total"]["processed"]),
        step=int(checkpoint["global_step"]),
        stepped=int(fit["epoch_loop.state_dict"]["_batches_that_stepped"]),
    )
    # Lightning saves inside of hooks. "processed" counts up after the last batch of an epoch, "completed" after the
    # hooks of its end; and likewise after a batch and its on_train_batch_end.
    if progress["current"]["completed"] < state.batches:
        state.stepped += 1
    if epochs["ready"] == epochs["processed"]:
        state.batches = 0
    elif progress["is_last_batch"]:
        state.next_epoch()
    return state
