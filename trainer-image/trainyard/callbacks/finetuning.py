"""BaseFinetuning and BackboneFinetuning: train a part first, and more of the model from some epoch on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from trainyard.callbacks.base import Callback
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

    Modules = torch.nn.Module | Iterable[Any]

_log = logging.getLogger("trainyard")


class BaseFinetuning(Callback):
    """`lightning.pytorch.callbacks.BaseFinetuning`: override `freeze_before_training` and `finetune_function`.

    What is frozen, and the parameter groups that were added, are restored on a resume; `finetune_function` is called once
    for an epoch, however often the epoch is begun.
    """

    def __init__(self) -> None:
        self._groups: dict[int, list[dict[str, Any]]] = {}
        """By optimizer: its parameter groups, with the parameters' names."""
        self._epoch = -1
        """The newest one that `finetune_function` was called for."""
        self._state: dict[str, Any] = {}
        """Which parameters are trained, and which batch normalisations follow their inputs, by name."""
        self._restored: dict[str, Any] | None = None

    # ---- to be overridden

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze what is not to be trained from the start. Raises NotImplementedError."""
        raise NotImplementedError(f"{type(self).__name__} has no freeze_before_training")

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """At the start of each epoch, for each optimizer: unfreeze what is due. Raises NotImplementedError."""
        raise NotImplementedError(f"{type(self).__name__} has no finetune_function")

    # ---- for those who override

    @staticmethod
    def flatten_modules(modules: Modules) -> list[torch.nn.Module]:
        """All modules in `modules`, of any nesting, that have no children or parameters of their own."""
        if isinstance(modules, torch.nn.ModuleDict):
            modules = modules.values()
        if isinstance(modules, torch.nn.Module):
            found = list(modules.modules())
        else:
            found = [part for module in modules for part in BaseFinetuning.flatten_modules(module)]
        return [part for part in found if not list(part.children()) or part._parameters]

    @staticmethod
    def filter_params(
        modules: Modules, train_bn: bool = True, requires_grad: bool = True
    ) -> Iterator[torch.nn.Parameter]:
        """The parameters whose requires_grad is `requires_grad`; without `train_bn`, not those of batch normalisation."""
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and not train_bn:
                continue
            yield from (p for p in module.parameters(recurse=False) if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        for module in BaseFinetuning.flatten_modules(modules):
            _train(module, True)

    @staticmethod
    def freeze_module(module: torch.nn.Module) -> None:
        """This one, without its children."""
        _train(module, False)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """All but, with `train_bn`, batch normalisation."""
        for module in BaseFinetuning.flatten_modules(modules):
            _train(module, isinstance(module, _BatchNorm) and train_bn)

    @staticmethod
    def filter_on_optimizer(
        optimizer: Optimizer, params: Iterable[torch.nn.Parameter]
    ) -> list[torch.nn.Parameter]:
        """Those that `optimizer` does not have yet; warns of the others."""
        has = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        given = list(params)
        new = [parameter for parameter in given if id(parameter) not in has]
        if len(new) < len(given):
            _log.warning(
                "%d parameters are in %s already, and stay in their group; to give them a learning rate of their own "
                "from when they are unfrozen, leave them out of configure_optimizers (filter by requires_grad)",
                len(given) - len(new), type(optimizer).__name__,
            )  # fmt: skip
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules, optimizer: Optimizer, lr: float | None = None, initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:  # fmt: skip
        """Make `modules` (without `train_bn`: all but batch normalisation) trainable, in a new group of `optimizer` with
        the rate `lr`, by default that of the first group divided by `initial_denom_lr`."""
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(module, _BatchNorm):
                _train(module, True)
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
        params = BaseFinetuning.filter_params(modules, train_bn=train_bn, requires_grad=True)
        new = BaseFinetuning.filter_on_optimizer(optimizer, params)
        if new:
            optimizer.add_param_group({"params": new, "lr": rate})

    # ---- a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a resume: as it was, before the optimizers' states are restored."""
        state, self._restored = self._restored, None
        if state is None:
            return
        named = dict(pl_module.named_parameters())
        for number, groups in self._groups.items():
            optimizer = trainer.optimizers[number]
            optimizer.param_groups = [
                {**group, "params": [named[name] for name in group["params"]]} for group in groups
            ]
        if "trainable" in state:
            _set_trainable(pl_module, set(state["trainable"]), set(state["tracking"]))
        else:  # a file of Lightning's, which does not say, but nobody optimizes what is frozen
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.requires_grad = True
        trainer.strategy.trainable_changed(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch <= self._epoch:
            return
        before = _trainable(pl_module)
        for number, optimizer in enumerate(trainer.optimizers):
            self.finetune_function(pl_module, epoch, optimizer)
            self._groups[number] = _named_groups(pl_module, optimizer)
        self._epoch = epoch
        self._state = {"trainable": _trainable(pl_module), "tracking": _tracking(pl_module)}
        if self._state["trainable"] != before:
            trainer.strategy.trainable_changed(pl_module)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Lightning's key, and ours under one."""
        state: dict[str, Any] = {"internal_optimizer_metadata": self._groups}
        if self._epoch >= 0:
            state["trainyard"] = {"epoch": self._epoch, **self._state}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("trainyard", {})
        self._epoch = self._restored.get("epoch", -1)
        self._state = {name: self._restored.get(name, []) for name in ("trainable", "tracking")}
        groups = state_dict.get("internal_optimizer_metadata", {})
        self._groups = {int(number): groups[number] for number in groups}


def multiplicative(epoch: int) -> float:
    """Lightning's default."""
    return 2.0


class BackboneFinetuning(BaseFinetuning):
    """`lightning.pytorch.callbacks.BackboneFinetuning`: `module.backbone` is frozen before the epoch
    `unfreeze_backbone_at_epoch`, and then has a group of its own.

    Its rate begins at `backbone_initial_lr`, or `backbone_initial_ratio_lr` of the first group's, and is multiplied by
    `lambda_func(epoch)` at each further epoch, until with `should_align` it is the first group's. Raises
    MisconfigurationException for a module that has no `backbone`.
    """

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, unfreeze_backbone_at_epoch: int = 10, lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 0.1, backbone_initial_lr: float | None = None, should_align: bool = True,
        initial_denom_lr: float = 10.0, train_bn: bool = True, verbose: bool = False, rounding: int = 12,
    ) -> None:  # fmt: skip
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr, self.backbone_initial_lr = (
            backbone_initial_ratio_lr,
            backbone_initial_lr,
        )
        self.should_align, self.initial_denom_lr = should_align, initial_denom_lr
        self.train_bn, self.verbose, self.rounding = train_bn, verbose, rounding
        self.previous_backbone_lr: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        _backbone(pl_module)

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(_backbone(pl_module), train_bn=self.train_bn)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        first = float(optimizer.param_groups[0]["lr"])
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        if epoch == self.unfreeze_backbone_at_epoch:
            rate = self.backbone_initial_lr
            rate = first * self.backbone_initial_ratio_lr if rate is None else rate
            self.unfreeze_and_add_param_group(
                _backbone(pl_module), optimizer, rate, train_bn=self.train_bn,
                initial_denom_lr=self.initial_denom_lr,
            )  # fmt: skip
        else:
            rate = self.lambda_func(epoch) * (self.previous_backbone_lr or 0.0)
            if self.should_align and rate > first:
                rate = first
            optimizer.param_groups[-1]["lr"] = rate
        self.previous_backbone_lr = rate
        if self.verbose:
            places = self.rounding
            _log.info("learning rates: %s, backbone %s", round(first, places), round(rate, places))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
        super().load_state_dict(state_dict)


def _train(module: torch.nn.Module, on: bool) -> None:
    """This one, without its children."""
    if isinstance(module, _BatchNorm):
        module.track_running_stats = on
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad = on


def _backbone(module: LightningModule) -> torch.nn.Module:
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, torch.nn.Module):
        raise MisconfigurationException(
            f"BackboneFinetuning: {type(module).__name__} needs an attribute `backbone` that is a torch.nn.Module"
        )
    return backbone


def _named_groups(module: LightningModule, optimizer: Optimizer) -> list[dict[str, Any]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


def _trainable(module: torch.nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _tracking(module: torch.nn.Module) -> list[str]:
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    ]


def _set_trainable(module: torch.nn.Module, trainable: set[str], tracking: set[str]) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad = name in trainable
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            part.track_running_stats = name in tracking
