"""What the trainer does with its loggers around an entry point: agree on the run, take it up again, say it to
checkpoints, and hand over the hyperparameters. A logger that fails here is left out, as everywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException
from trainyard.loggers.base import Logger
from trainyard.utilities.optional import has

if TYPE_CHECKING:
    from trainyard.peers import Peers

_log = logging.getLogger("trainyard")


def default_logger(save_dir: str | Path) -> Logger:
    """Trainer(logger=True): TensorBoard if it is installed, else CSV."""
    if has("tensorboard"):
        from trainyard.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(save_dir)
    from trainyard.loggers.csv_logs import CSVLogger

    return CSVLogger(save_dir)


def working(loggers: Iterable[Logger], use: Callable[[Logger], Any]) -> list[Logger]:
    """Those for which `use` did not raise."""
    kept = []
    for logger in loggers:
        try:
            use(logger)
        except Exception as error:  # whatever it is, it must not stop training
            _log.warning(
                "%s is left out from now on: %s: %s", type(logger).__name__, type(error).__name__, error
            )
        else:
            kept.append(logger)
    return kept


def begin(
    loggers: Sequence[Logger], peers: Peers, *, saved: Sequence[dict[str, Any]] = (), step: int | None = None
) -> list[Logger]:
    """Collective, at the start of an entry point, before a logger is used: the loggers to use from now on, the same on
    all ranks.

    `saved`: `states` of the checkpoint, if this is the run that wrote it (an attempt of a TrainingRun, or a restart);
    nothing for a new run that only starts from somebody's checkpoint. `step`: optimizer steps done, for a fit.
    """
    answers: list[dict[str, Any] | None] = []
    if peers.rank == 0:
        for number, logger in enumerate(loggers):
            earlier = saved[number] if number < len(saved) else {}
            if working([logger], lambda one, earlier=earlier: _take_up(one, earlier, step)):  # type: ignore[misc]
                answers.append(logger.state_dict())
            else:
                answers.append(None)
    answers = peers.broadcast(answers)
    if peers.rank != 0:
        for logger, answer in zip(loggers, answers, strict=True):
            if answer is not None:
                logger.load_state_dict(answer)
    return [logger for logger, answer in zip(loggers, answers, strict=True) if answer is not None]


def _take_up(logger: Logger, earlier: dict[str, Any], step: int | None) -> None:
    if earlier.get("logger") == type(logger).__name__:
        logger.load_state_dict(earlier["state"])
    if step is not None:
        logger.resume(step)
    logger.state_dict()


def states(loggers: Sequence[Logger]) -> list[dict[str, Any]]:
    """For a checkpoint, on rank 0: one entry for each of all the trainer's loggers, also for those that were left out,
    so that the next attempt can tell them apart by their places."""
    found: list[dict[str, Any]] = []
    for logger in loggers:
        try:
            found.append({"logger": type(logger).__name__, "state": logger.state_dict()})
        except (
            Exception
        ) as error:  # it has been left out already, or will be at its next flush, which says so
            _log.debug("%s has no state: %s", type(logger).__name__, error)
            found.append({})
    return found


def initial_hparams(module: Any, datamodule: Any = None) -> dict[str, Any] | None:
    """What both saved with save_hyperparameters(logger=True); None if neither did.

    Raises MisconfigurationException when they disagree about a name.
    """
    parts = [
        dict(owner.hparams_initial)
        for owner in (module, datamodule)
        if owner is not None and getattr(owner, "_log_hyperparams", False)
    ]
    if not parts:
        return None
    if len(parts) == 2:
        clashes = [
            name for name in parts[0] if name in parts[1] and not _same(parts[0][name], parts[1][name])
        ]
        if clashes:
            raise MisconfigurationException(
                f"save_hyperparameters: module and data module have different values for {', '.join(sorted(clashes))}; "
                "rename one, or pass logger=False to one of them"
            )
    return {name: value for part in parts for name, value in part.items()}


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    try:
        return bool(one is other or one == other)
    except (RuntimeError, ValueError):  # tensors and arrays of several elements
        return False
