"""The callbacks and loggers that a Trainer has unless it is told otherwise."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.callbacks.order import in_order
from trainyard.errors import MisconfigurationException
from trainyard.loggers.base import Logger
from trainyard.loggers.dummy import DummyLogger
from trainyard.loggers.session import default_logger

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


def make_loggers(given: Any, root: str, *, quick: bool) -> list[Logger]:
    """For Trainer(logger=...). True: TensorBoard where it is installed, else CSV files; both need a folder. `quick`: a
    fast_dev_run, whose loggers take everything and keep nothing."""
    if given is False:
        return []
    if quick:
        return [DummyLogger()]
    if given is None or given is True:
        if "://" in root:
            _log.warning(
                "default_root_dir: loggers write to folders, not to %s; give the Trainer loggers of its own",
                root,
            )
            return []
        return [default_logger(root)]
    loggers = [given] if isinstance(given, Logger) else list(given)
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise MisconfigurationException(f"logger: a {type(logger).__name__} is no Logger")
    return loggers


def as_callbacks(given: Any, where: str = "callbacks") -> list[Callback]:
    """Raises MisconfigurationException."""
    callbacks = [given] if isinstance(given, Callback) else list(given or [])
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise MisconfigurationException(f"{where}: a {type(callback).__name__} is no Callback")
    return callbacks


def with_defaults(
    callbacks: list[Callback], *, checkpointing: bool, progress_bar: bool, summary: bool, max_time: Any
) -> list[Callback]:
    """Adds what is on by default and not there yet. Raises MisconfigurationException for what contradicts itself."""
    from trainyard.callbacks.model_checkpoint import Checkpoint, ModelCheckpoint
    from trainyard.callbacks.model_summary import ModelSummary, default_model_summary
    from trainyard.callbacks.progress import ProgressBar, default_progress_bar
    from trainyard.callbacks.timer import Timer

    found = list(callbacks)
    bars = [c for c in found if isinstance(c, ProgressBar)]
    if len(bars) > 1:
        raise MisconfigurationException("callbacks: there is more than one progress bar")
    if bars and not progress_bar:
        raise MisconfigurationException(
            "callbacks: a progress bar, and enable_progress_bar=False: leave one of them out"
        )
    if not bars and progress_bar:
        found.append(default_progress_bar())
    if summary and not any(isinstance(c, ModelSummary) for c in found):
        found.append(default_model_summary())
    if max_time is not None and not any(isinstance(c, Timer) for c in found):
        found.append(Timer(duration=max_time))
    if checkpointing and not any(isinstance(c, Checkpoint) for c in found):
        found.append(ModelCheckpoint())
    return in_order(found)


def attach_module_callbacks(trainer: Trainer) -> None:
    """Those of configure_callbacks take the place of the Trainer's of the same class; all may log (Lightning's rules)."""
    own = as_callbacks(trainer.lightning_module.configure_callbacks(), "configure_callbacks")
    if own:
        kinds = {type(c) for c in own}
        trainer.callbacks = in_order([c for c in trainer.callbacks if type(c) not in kinds] + own)
    module = trainer.lightning_module
    for callback in trainer.callbacks:
        callback.log, callback.log_dict = module.log, module.log_dict
