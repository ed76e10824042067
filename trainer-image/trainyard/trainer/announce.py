"""What the loggers are told before anything is logged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.loggers.session import initial_hparams

if TYPE_CHECKING:
    from trainyard.loggers.base import Logger
    from trainyard.trainer.trainer import Trainer


def announce(trainer: Trainer) -> None:
    """Hyperparameters and graph, on rank 0. Raises MisconfigurationException, on all ranks, if the module and the data
    module have different values for one name."""
    if not trainer.enable_autolog_hparams:
        return
    module = trainer.lightning_module
    hparams = initial_hparams(module, trainer.datamodule)
    # A forward pass that the other ranks do not run would wait for them.
    draws = not trainer.strategy.forward_is_collective

    def tell(logger: Logger) -> None:
        if hparams is not None:
            logger.log_hyperparams(hparams)
        if draws:
            logger.log_graph(module)
        logger.save()

    trainer.metrics.each_logger(tell)
