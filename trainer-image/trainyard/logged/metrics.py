"""From `self.log` to callbacks, loggers and the progress bar. Only a flush turns tensors into numbers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from trainyard.data.batches import size_of
from trainyard.errors import MisconfigurationException
from trainyard.logged.item import Item
from trainyard.logged.options import Options, epoch_name, step_name
from trainyard.logged.results import Results, Values, to_floats
from trainyard.logged.torchmetrics import is_metric, load_metric_states, metric_states, path_of
from trainyard.logged.virtual import VirtualResults, Where

if TYPE_CHECKING:
    import torch

    from trainyard.core.module import LightningModule
    from trainyard.loggers.base import Logger
    from trainyard.strategies.base import Strategy

_log = logging.getLogger("trainyard")


class Metrics:
    """Of one call of an entry point."""

    def __init__(self, strategy: Strategy, loggers: list[Logger]) -> None:
        self._strategy = strategy
        self.loggers = loggers
        """Those that work."""
        self.where: Where | None = None
        """With virtual ranks: which of them logs now."""
        if strategy.virtual_ranks:
            where = self.where = Where(first=strategy.is_global_zero)
            self.train, self.validate, self.test = (VirtualResults(where) for _ in range(3))
        else:
            self.train, self.validate, self.test = Results(), Results(), Results()
        self.stage: Results = self.train
        """Where `log` writes now."""
        self.hook: str | None = None
        """The hook that runs now; None where `log` is not allowed."""
        self.batch: Any = None
        """Of this rank; its size is looked up when a mean over an epoch asks for it."""
        self.weight: int | None = None
        """Samples in `batch`: None until it is looked up, 0 if they do not count."""
        self.loader: int | None = None
        """Number of the evaluation loader, when there are several."""
        self.quiet = False
        """In the sanity check nothing is published, and `end_quiet` forgets what callbacks could read."""
        self.callback: dict[str, torch.Tensor] = {}
        self.logged: dict[str, float] = {}
        self.bar: dict[str, float] = {}
        self.validation: dict[str, float] = {}

    def enter(self, virtual: int | None, moment: int) -> None:
        """What is logged from now on belongs to the batch of a virtual rank; None: to none of them."""
        if self.where is not None:
            self.where.rank, self.where.moment = virtual, moment

    # ---- what a step logs

    def record(
        self, module: LightningModule, name: str, value: Any, args: tuple[Any, ...], batch_size: int | None
    ) -> None:
        """`args`: the arguments of `LightningModule.log` from prog_bar to metric_attribute, without batch_size.

        Raises MisconfigurationException, ValueError.
        """
        item = self.stage.known.get((name, self.hook, self.loader))
        if item is None or item.args != args:
            item = self._resolve(module, name, value, args)
        weight = batch_size
        if not item.options.on_epoch:
            weight = 0
        elif weight is None or self.weight == 0:
            weight = self.weight
            if weight is None:
                weight = self.weight = size_of(self.batch)
        item.update(name, value, weight)

    def _resolve(self, module: LightningModule, name: str, value: Any, args: tuple[Any, ...]) -> Item:
        """The first call with a key in a hook, or one with other arguments."""
        prog_bar, logger, on_step, on_epoch, reduce, graph, sync, group, add_index, attribute = args
        metric = path = None
        if is_metric(value):
            metric, path = value, path_of(module, value, attribute)
            if path is None:
                raise MisconfigurationException(
                    f"self.log({name!r}): the metric is no attribute of {type(module).__name__}, so it could be neither "
                    "moved to a device nor reset; assign it in __init__"
                )
        # Virtual ranks reduce all that they log; and what they have summed up may go on at another world size.
        sync = self.where is not None or (sync and self._strategy.peers.world > 1)
        options = Options.of(
            self.hook, on_step=on_step, on_epoch=on_epoch, prog_bar=prog_bar, logger=logger, reduce=reduce,
            sync=sync, enable_graph=graph, metric=path or "", group=group,
        )  # fmt: skip
        key = f"{name}/dataloader_idx_{self.loader}" if add_index and self.loader is not None else name
        item = self.stage.add(key, self.stage.make(options, args, metric))
        self.stage.known[name, self.hook, self.loader] = item
        return item

    # ---- what callbacks read

    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """The newest value of every key, not synchronised between two flushes."""
        return {**self.callback, **self._unpublished()}

    def _unpublished(self) -> dict[str, torch.Tensor]:
        """Values of steps since the last flush. With virtual ranks they are nobody's before they are reduced."""
        if self.where is not None:
            return {}
        found: dict[str, torch.Tensor] = {}
        for name, item in self.train.items.items():
            if item.options.on_step and not item.published:
                value = item.step_value(self._strategy.device)
                if value is not None:
                    found[step_name(name, item.options)] = found[name] = value
        return found

    def bar_values(self) -> dict[str, float]:
        """What a progress bar shows. On a CPU that is what the last step logged; numbers on another device are those of the
        last flush, because fetching them would wait for it."""
        found = dict(self.bar)
        if self._strategy.device.type != "cpu" or self.where is not None:
            return found
        for name, item in self.train.items.items():
            options = item.options
            waits = item.metric is not None and getattr(item.metric, "_forward_cache", None) is None
            if options.prog_bar and options.on_step and not item.published and not waits:
                value = item.step_value(self._strategy.device)
                if value is not None:
                    found[step_name(name, options)] = float(value)
        return found

    # ---- flushes

    def flush_step(self, *, step: int, epoch: int) -> None:
        """Collective if a key has sync_dist."""
        values = self.stage.step_values(self._strategy)
        if not values:
            return
        named = {step_name(n, o): (o, v) for n, (o, v) in values.items()}
        self.callback.update({n: v for n, (_, v) in named.items()})
        self.callback.update({n: v for n, (_, v) in values.items()})
        if not self.quiet:
            self._publish(named, step=step, epoch=epoch)

    def flush_epoch(self, results: Results, *, step: int, epoch: int) -> dict[str, float]:
        """Collective: reduce what was logged with on_epoch since the last call; the numbers by the names they go under."""
        values = results.epoch_values(self._strategy)
        if results is self.train:  # what the last steps logged must not hide the epoch's values
            if self.where is not None:
                steps = results.step_values(self._strategy)
                self.callback.update({step_name(n, o): v for n, (o, v) in steps.items()})
                self.callback.update({n: v for n, (_, v) in steps.items()})
            self.callback.update(self._unpublished())
            for item in results.items.values():
                item.published = True
        named: Values = {epoch_name(n, o): (o, v) for n, (o, v) in values.items()}
        self.callback.update({n: v for n, (_, v) in named.items()})
        self.callback.update({n: v for n, (_, v) in values.items()})
        if self.quiet:
            return {}
        floats = self._publish(named, step=step, epoch=epoch)
        if results is self.validate:
            self.validation.update(floats)
        return floats

    def end_quiet(self) -> None:
        """After the sanity check: hooks have found its values, as they do in Lightning, and nobody else does."""
        self.quiet = False
        self.callback.clear()
        self.validate.reset()

    def finalize(self, status: str) -> None:
        self.each_logger(lambda logger: logger.finalize(status))

    def _publish(self, values: Values, *, step: int, epoch: int) -> dict[str, float]:
        floats = to_floats({name: value for name, (_, value) in values.items()})
        self.bar.update({n: v for n, v in floats.items() if values[n][0].prog_bar})
        to_log = {n: v for n, v in floats.items() if values[n][0].logger}
        self.logged.update(to_log)
        if to_log:
            self.each_logger(lambda logger: logger.log_metrics({**to_log, "epoch": epoch}, step))
        return floats

    def each_logger(self, use: Any) -> None:
        """A logger that fails (disk full, network down) is left out from then on: it must not stop training."""
        for logger in list(self.loggers):
            try:
                use(logger)
            except Exception as error:
                self.loggers.remove(logger)
                _log.warning(
                    "%s is left out from now on: %s: %s", type(logger).__name__, type(error).__name__, error
                )

    # ---- state

    def state_dict(self, module: LightningModule) -> dict[str, Any]:
        """Of this rank, in the middle of a training epoch."""
        return {"logged": self.train.state_dict(), "metrics": metric_states(module)}

    def load_state_dict(self, module: LightningModule, state: dict[str, Any]) -> None:
        self.train.load_state_dict(state["logged"], self._strategy.device)
        load_metric_states(module, state["metrics"], self._strategy.device)

    def load_moved(self, states: list[dict[str, Any]]) -> None:
        """Of all ranks of another world size. Only with virtual ranks: what they have summed up belongs to none of them.
        Metric objects begin anew."""
        if isinstance(self.train, VirtualResults) and self._strategy.is_global_zero:
            self.train.load_merged([state["logged"] for state in states], self._strategy.device)
