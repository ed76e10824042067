"""LightningModule: a torch module that says how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainyard.core.exporting import ExportMethods
from trainyard.core.hooks import DataHooks, ModelHooks
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainyard.trainer.trainer import Trainer


class LightningModule(ExportMethods, DataHooks, ModelHooks, torch.nn.Module):
    """The part of `lightning.pytorch.LightningModule` that belongs to training and validation, with its names."""

    prepare_data_per_node: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_trainer"] = None  # not through nn.Module: a trainer is no submodule

    # ---- to be overridden

    def training_step(self, *args: Any) -> Any:
        """(batch, batch_idx): the loss, a dict with "loss", or None to skip the batch (one process only)."""
        raise MisconfigurationException(f"{type(self).__name__} has no training_step")

    def validation_step(self, *args: Any) -> Any:
        """(batch, batch_idx[, dataloader_idx])."""
        raise MisconfigurationException(f"{type(self).__name__} has no validation_step")

    def configure_optimizers(self) -> Any:
        """See `optimizers.configure`."""
        raise MisconfigurationException(f"{type(self).__name__} has no configure_optimizers")

    def configure_callbacks(self) -> Any:
        """Callbacks that come with the model: one or a list."""
        return []

    def configure_model(self) -> None:
        """Make large layers here instead of in __init__."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By global norm ("norm") or element-wise ("value")."""
        if not gradient_clip_val:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    # ---- what a module may ask

    @property
    def trainer(self) -> Trainer:
        """Raises RuntimeError outside of fit."""
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a Trainer")
        return trainer  # type: ignore[no-any-return]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.__dict__["_trainer"] = trainer

    @property
    def device(self) -> torch.device:
        first = next(self.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        first = next(self.parameters(), None)
        return torch.get_default_dtype() if first is None else first.dtype

    @property
    def current_epoch(self) -> int:
        trainer = self.__dict__.get("_trainer")
        return 0 if trainer is None else trainer.current_epoch

    @property
    def global_step(self) -> int:
        trainer = self.__dict__.get("_trainer")
        return 0 if trainer is None else trainer.global_step

    @property
    def global_rank(self) -> int:
        trainer = self.__dict__.get("_trainer")
        return 0 if trainer is None else trainer.global_rank

    @property
    def local_rank(self) -> int:
        trainer = self.__dict__.get("_trainer")
        return 0 if trainer is None else trainer.local_rank

    @property
    def logger(self) -> Any:
        return self.trainer.logger

    @property
    def loggers(self) -> list[Any]:
        return self.trainer.loggers

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer of this run."""
        return self.trainer.optimizers[0]

    def lr_schedulers(self) -> Any:
        """None, the scheduler, or a list of several."""
        found = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not found else found[0] if len(found) == 1 else found

    def print(self, *args: Any, **kwargs: Any) -> None:
        """On rank 0 only."""
        self.trainer.print(*args, **kwargs)

    # ---- logging

    def log(  # noqa: PLR0917 - Lightning's signature
        self, name: str, value: Any, prog_bar: bool = False, logger: bool | None = None, on_step: bool | None = None,
        on_epoch: bool | None = None, reduce_fx: str | Callable[..., Any] = "mean", enable_graph: bool = False,
        sync_dist: bool = False, sync_dist_group: Any = None, add_dataloader_idx: bool = True,
        batch_size: int | None = None, metric_attribute: str | None = None, rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        """Log a scalar from a step or hook. Lightning's rules: see `results.Options` and `results.Results`.

        Raises MisconfigurationException where it makes no sense, ValueError for what is no scalar.
        """
        if enable_graph or sync_dist_group is not None or metric_attribute is not None:
            raise MisconfigurationException(
                "self.log: enable_graph, sync_dist_group and metric_attribute are not supported by this version"
            )
        reduce = (
            reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "?").removeprefix("a")
        )
        self.trainer.record(
            name, value, prog_bar=prog_bar, logger=logger is not False, on_step=on_step, on_epoch=on_epoch,
            reduce=reduce, sync=sync_dist, add_dataloader_idx=add_dataloader_idx, batch_size=batch_size,
            rank_zero_only=rank_zero_only,
        )  # fmt: skip

    def log_dict(self, dictionary: Mapping[str, Any], **kwargs: Any) -> None:
        """`log` for each entry, with the same arguments."""
        for name, value in dictionary.items():
            self.log(name, value, **kwargs)
