"""LightningModule: a torch module that says how it is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainyard.core.exporting import ExportMethods
from trainyard.core.hooks import DataHooks, ModelHooks
from trainyard.core.hparams import HyperparametersMixin
from trainyard.core.logging_methods import LogMethods
from trainyard.core.saving import LoadModule
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainyard.optimization.manual import LightningOptimizer
    from trainyard.trainer.trainer import Trainer


class LightningModule(
    HyperparametersMixin, LoadModule, ExportMethods, LogMethods, DataHooks, ModelHooks, torch.nn.Module
):
    """`lightning.pytorch.LightningModule`: the same methods, hooks and attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Not through nn.Module: a trainer is no submodule.
        self.__dict__.update(
            _trainer=None, _automatic_optimization=True, _example_input_array=None, _strict_loading=None,
            _device_mesh=None, _toggled={},
        )  # fmt: skip

    # ---- to be overridden

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx): the loss, a dict with "loss", or None to skip the batch (one process only)."""
        raise MisconfigurationException(f"{type(self).__name__} has no training_step")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx[, dataloader_idx])."""
        raise MisconfigurationException(f"{type(self).__name__} has no validation_step")

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx[, dataloader_idx])."""
        raise MisconfigurationException(f"{type(self).__name__} has no test_step")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """(batch, batch_idx[, dataloader_idx]): by default what forward makes of the batch."""
        return self(args[0] if args else kwargs["batch"])

    def configure_optimizers(self) -> Any:
        """See `optimization.configure`."""
        raise MisconfigurationException(f"{type(self).__name__} has no configure_optimizers")

    def configure_callbacks(self) -> Any:
        """Callbacks that come with the model: one or a list."""
        return []

    def configure_model(self) -> None:
        """Make large layers here instead of in __init__. May be called several times."""

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """What automatic optimization and `manual_backward` call; `loss` is scaled already."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:  # fmt: skip
        """`optimizer_closure` runs training_step and backward; it must be called."""
        self.trainer.strategy.optimizer_step(optimizer, optimizer_closure or (lambda: None))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Override for `set_to_none=False`."""
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:  # fmt: skip
        """Before each optimizer step, if the Trainer clips or this is overridden: calls `clip_gradients`."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:  # fmt: skip
        """By global norm ("norm") or element-wise ("value"); the Trainer's values unless others are given."""
        value = self.trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        algorithm = gradient_clip_algorithm or self.trainer.gradient_clip_algorithm or "norm"
        if algorithm not in ("norm", "value"):
            raise MisconfigurationException(
                f"gradient_clip_algorithm: {algorithm!r} is not 'norm' or 'value'"
            )
        if value:
            inner = getattr(optimizer, "optimizer", optimizer)
            self.trainer.strategy.clip_gradients(self, inner, float(value), algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """`metric` is the value of `monitor`, None for a scheduler without one."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    # ---- manual optimization

    @property
    def automatic_optimization(self) -> bool:
        """False: training_step runs backward and steps the optimizers itself."""
        return bool(self.__dict__["_automatic_optimization"])

    @automatic_optimization.setter
    def automatic_optimization(self, automatic: bool) -> None:
        self.__dict__["_automatic_optimization"] = automatic

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or a list of several; their steps count as global steps unless `use_pl_optimizer` is False."""
        found: list[Any] = list(
            self.trainer.lightning_optimizers if use_pl_optimizer else self.trainer.optimizers
        )
        return found[0] if len(found) == 1 else found

    def lr_schedulers(self) -> Any:
        """None, the scheduler, or a list of several."""
        found = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """`loss.backward()` in the Trainer's precision and strategy. Raises MisconfigurationException if the
        optimization is automatic."""
        if self.automatic_optimization:
            raise MisconfigurationException(
                "manual_backward: set self.automatic_optimization = False in __init__"
            )
        trainer = self.trainer
        trainer.hooks("on_before_backward", loss)
        trainer.strategy.backward(self, trainer.strategy.precision.scale(loss), *args, **kwargs)
        trainer.hooks("on_after_backward")

    def toggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Until `untoggle_optimizer`, only `optimizer`'s parameters require gradients."""
        kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
        toggled: dict[torch.nn.Parameter, bool] = self.__dict__["_toggled"]
        for other in self.trainer.optimizers:
            for parameter in (p for group in other.param_groups for p in group["params"]):
                toggled.setdefault(parameter, parameter.requires_grad)
                parameter.requires_grad = toggled[parameter] and id(parameter) in kept

    def untoggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """All parameters require gradients again that did before."""
        toggled: dict[torch.nn.Parameter, bool] = self.__dict__["_toggled"]
        for parameter, required in toggled.items():
            parameter.requires_grad = required
        toggled.clear()

    @contextlib.contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> Iterator[None]:
        """Both, around what is inside."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    # ---- what a module may ask

    @property
    def trainer(self) -> Trainer:
        """Raises RuntimeError where there is none."""
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a Trainer")
        return trainer  # type: ignore[no-any-return]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        for module in self.modules():
            if isinstance(module, LightningModule):
                module.__dict__["_trainer"] = trainer

    @property
    def example_input_array(self) -> Any:
        """A tensor, a tuple of forward's arguments, or a dict of them: for the summary, the graph and exports."""
        return self.__dict__["_example_input_array"]

    @example_input_array.setter
    def example_input_array(self, example: Any) -> None:
        self.__dict__["_example_input_array"] = example

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must have exactly this module's parameters."""
        strict = self.__dict__["_strict_loading"]
        return True if strict is None else bool(strict)

    @strict_loading.setter
    def strict_loading(self, strict: bool) -> None:
        self.__dict__["_strict_loading"] = strict

    @property
    def device_mesh(self) -> Any:
        """Of strategies that have one, from configure_model on; None for the others."""
        trainer = self.__dict__["_trainer"]
        strategy = None if trainer is None else trainer.strategy
        return self.__dict__["_device_mesh"] or getattr(strategy, "device_mesh", None)

    @property
    def device(self) -> torch.device:
        """Of the first parameter; the CPU without one."""
        first = next(self.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter; torch's default without one."""
        first = next(self.parameters(), None)
        return torch.get_default_dtype() if first is None else first.dtype

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def current_epoch(self) -> int:
        """Epochs completed."""
        return int(self._of_trainer("current_epoch", 0))

    @property
    def global_step(self) -> int:
        """Optimizer steps since the start of the run."""
        return int(self._of_trainer("global_step", 0))

    @property
    def global_rank(self) -> int:
        return int(self._of_trainer("global_rank", 0))

    @property
    def local_rank(self) -> int:
        return int(self._of_trainer("local_rank", 0))

    @property
    def logger(self) -> Any:
        """The first one; None without a logger."""
        return self._of_trainer("logger", None)

    @property
    def loggers(self) -> list[Any]:
        return list(self._of_trainer("loggers", []))

    def _of_trainer(self, name: str, without: Any) -> Any:
        trainer = self.__dict__.get("_trainer")
        return without if trainer is None else getattr(trainer, name)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """On rank 0 only, and around a progress bar."""
        if self.__dict__.get("_trainer") is None:
            print(*args, **kwargs)
        else:
            self.trainer.print(*args, **kwargs)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """`data` of all ranks: tensors, or collections of them, with a new first dimension (in a world of one: as is)."""
        from trainyard.data.batches import apply_to_tensors

        strategy = self.trainer.strategy
        if strategy.virtual_ranks and self.trainer.metrics.hook == "training_step":
            raise MisconfigurationException(
                "self.all_gather in training_step: with deterministic='elastic' a step must not depend on the number of "
                "processes; compute from the batch alone"
            )

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            return strategy.all_gather(tensor.to(strategy.device), group, sync_grads)

        return apply_to_tensors(data, gather)

    def freeze(self) -> None:
        """No parameter requires gradients; evaluation mode."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        self.eval()

    def unfreeze(self) -> None:
        """All parameters require gradients; training mode."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        self.train()

    def __getstate__(self) -> dict[str, Any]:
        """Without the trainer: copies and other processes have their own."""
        return {**self.__dict__, "_trainer": None}
