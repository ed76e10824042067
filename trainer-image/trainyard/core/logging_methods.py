"""The module's `log` and `log_dict`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule

_log = logging.getLogger("trainyard")
_warned: set[str] = set()


class LogMethods:
    """Part of LightningModule."""

    def log(  # noqa: PLR0917 - Lightning's signature
        self: LightningModule, name: str, value: Any, prog_bar: bool = False, logger: bool | None = None,  # type: ignore[misc]
        on_step: bool | None = None, on_epoch: bool | None = None, reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False, sync_dist: bool = False, sync_dist_group: Any = None,
        add_dataloader_idx: bool = True, batch_size: int | None = None, metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        """Log a scalar, or a torchmetrics object, from a step or hook. Lightning's rules: see `logged.options`.

        Nothing waits for the device before the numbers are wanted. Raises MisconfigurationException where it makes no
        sense, ValueError for what is no scalar.
        """
        if torch.compiler.is_compiling():
            return _outside_of_the_graph(
                self, name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist,
                sync_dist_group, add_dataloader_idx, batch_size, metric_attribute, rank_zero_only,
            )  # fmt: skip
        trainer = self.__dict__["_trainer"]
        if trainer is None:
            return _without_a_trainer(self)
        if rank_zero_only and not trainer.is_global_zero:
            return None
        trainer.metrics.record(
            self, name, value,
            (prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist and not rank_zero_only,
             sync_dist_group, add_dataloader_idx, metric_attribute),
            batch_size,
        )  # fmt: skip
        return None

    def log_dict(  # noqa: PLR0917 - Lightning's signature
        self: LightningModule, dictionary: Mapping[str, Any], prog_bar: bool = False, logger: bool | None = None,  # type: ignore[misc]
        on_step: bool | None = None, on_epoch: bool | None = None, reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False, sync_dist: bool = False, sync_dist_group: Any = None,
        add_dataloader_idx: bool = True, batch_size: int | None = None, rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        """`log` for each entry, with the same arguments. Takes a torchmetrics MetricCollection too."""
        if not callable(getattr(dictionary, "items", None)):
            raise MisconfigurationException(
                f"self.log_dict: a {type(dictionary).__name__} is no mapping of names to values"
            )
        for name, value in dictionary.items():
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, None, rank_zero_only,
            )  # fmt: skip


def _outside_of_the_graph(module: LightningModule, *args: Any) -> None:
    module.log(*args)


def keep_out_of_graphs() -> None:
    """Before steps are run that may have been compiled. torch.compiler.disable itself imports the compiler, which takes
    as long as importing torch: it is left to those who have it already."""
    global _outside_of_the_graph  # noqa: PLW0603 - one function of the process
    if "torch._dynamo" in sys.modules and not hasattr(_outside_of_the_graph, "_torchdynamo_disable"):
        _outside_of_the_graph = torch.compiler.disable(_outside_of_the_graph)


def _without_a_trainer(module: LightningModule) -> None:
    kind = type(module).__name__
    if kind not in _warned:
        _warned.add(kind)
        _log.warning("self.log in %s has no effect: it is not attached to a Trainer", kind)
