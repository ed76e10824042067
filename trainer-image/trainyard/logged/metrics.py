"""From `self.log` to callbacks, loggers and the progress line. Only a flush turns tensors into numbers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from trainyard.logged.results import Options, Results, epoch_names, step_names, to_floats

if TYPE_CHECKING:
    import torch

    from trainyard.loggers.base import Logger
    from trainyard.strategies.base import Strategy

_log = logging.getLogger("trainyard")


class Metrics:
    """Of one fit."""

    def __init__(self, strategy: Strategy, loggers: list[Logger]) -> None:
        self._strategy = strategy
        self._loggers = loggers
        self.train, self.validate = Results(), Results()
        self.stage = self.train
        """Where `log` writes now."""
        self.hook: str | None = None
        """The hook that runs now; None where `log` is not allowed."""
        self.weight: float = 1.0
        """Samples in the current batch of this rank."""
        self.suffix = ""
        """"/dataloader_idx_1" with several validation loaders."""
        self.quiet = False
        """In the sanity check nothing is kept."""
        self.callback: dict[str, torch.Tensor] = {}
        self.logged: dict[str, float] = {}
        self.bar: dict[str, float] = {}
        self.validation: dict[str, float] = {}

    def record(
        self, name: str, value: Any, *, prog_bar: bool, logger: bool, on_step: bool | None, on_epoch: bool | None,
        reduce: str, sync: bool, add_dataloader_idx: bool, batch_size: int | None,
    ) -> None:  # fmt: skip
        """Raises MisconfigurationException, ValueError."""
        options = Options.of(
            self.hook, on_step=on_step, on_epoch=on_epoch, prog_bar=prog_bar, logger=logger, reduce=reduce,
            sync=sync and self._strategy.peers.world > 1,
        )  # fmt: skip
        weight = self.weight if batch_size is None or self.weight == 0 else batch_size
        self.stage.log(
            name + self.suffix if add_dataloader_idx else name, value, options, weight=weight,
            device=self._strategy.device,
        )  # fmt: skip

    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """The newest value of every key, not synchronised between two flushes."""
        return {**self.callback, **self._unpublished()}

    def _unpublished(self) -> dict[str, torch.Tensor]:
        """Values of steps since the last flush."""
        found: dict[str, torch.Tensor] = {}
        for name, item in self.train.items.items():
            if item.options.on_step and not item.published:
                found[step_names(name, item.options)] = found[name] = item.step_value
        return found

    def flush_step(self, *, step: int, epoch: int) -> None:
        """Collective if a key has sync_dist."""
        values = self.train.step_values(self._strategy)
        self.callback.update({step_names(n, o): v for n, (o, v) in values.items()})
        self.callback.update({n: v for n, (_, v) in values.items()})
        self._publish({step_names(n, o): (o, v) for n, (o, v) in values.items()}, step=step, epoch=epoch)

    def flush_epoch(self, results: Results, *, step: int, epoch: int) -> None:
        """Collective: reduce what was logged with on_epoch since the last call."""
        values = results.epoch_values(self._strategy)
        if self.quiet:
            return
        if results is self.train:  # what the last steps logged must not hide the epoch's values
            self.callback.update(self._unpublished())
            for item in results.items.values():
                item.published = True
        self.callback.update({epoch_names(n, o): v for n, (o, v) in values.items()})
        self.callback.update({n: v for n, (_, v) in values.items()})
        named = {epoch_names(n, o): (o, v) for n, (o, v) in values.items()}
        floats = self._publish(named, step=step, epoch=epoch)
        if results is self.validate:
            self.validation.update(floats)

    def finalize(self, status: str) -> None:
        self._each_logger(lambda logger: logger.finalize(status))

    def _publish(
        self, values: dict[str, tuple[Options, torch.Tensor]], *, step: int, epoch: int
    ) -> dict[str, float]:
        floats = to_floats({name: value for name, (_, value) in values.items()})
        self.bar.update({n: v for n, v in floats.items() if values[n][0].prog_bar})
        to_log = {n: v for n, v in floats.items() if values[n][0].logger}
        self.logged.update(to_log)
        if to_log:
            self._each_logger(lambda logger: logger.log_metrics({**to_log, "epoch": epoch}, step))
        return floats

    def _each_logger(self, use: Any) -> None:
        """A logger that fails (disk full, network down) is left out from then on: it must not stop training."""
        for logger in list(self._loggers):
            try:
                use(logger)
            except Exception as error:
                self._loggers.remove(logger)
                _log.warning(
                    "%s is left out from now on: %s: %s", type(logger).__name__, type(error).__name__, error
                )
