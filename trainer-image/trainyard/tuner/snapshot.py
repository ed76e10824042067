"""Everything that a few steps of training change, in memory, to have it back bit by bit."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import UninitializedParameter

from trainyard.logged.torchmetrics import load_metric_states, metric_states
from trainyard.reproducibility import rng_state, set_rng_state

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainyard.trainer.trainer import Trainer


class Snapshot:
    """Of this rank: weights, buffers, gradients, optimizers, loss scale, metrics, generators, and generators of loaders.

    What a module keeps elsewhere (a counter of its own, say) is not known here, and not restored. Weights and buffers are
    kept in the host's memory, sharded parameters as this rank's shards.
    """

    @torch.inference_mode(False)
    def __init__(self, trainer: Trainer, loaders: list[Any]) -> None:
        self._trainer = trainer
        module = trainer.lightning_module
        self._parameters = [
            (p, _host_copy(p), p.grad)
            for p in module.parameters()
            if not isinstance(p, UninitializedParameter)
        ]
        self._buffers = [
            (part, name, buffer, _host_copy(buffer))
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        self._modes = [(part, part.training) for part in module.modules()]
        self._metrics = metric_states(module)
        self._optimizers = [(optimizer, _contents(optimizer)) for optimizer in trainer.optimizers]
        self._precision = copy.deepcopy(trainer.precision_plugin.state_dict())
        self._generators = [(g, g.get_state()) for loader in loaders for g in _generators(loader)]
        self._rng = rng_state()
        for parameter, _, _ in self._parameters:
            parameter.grad = None  # what is there now is kept, so nothing may be added to it

    @torch.inference_mode(False)
    def restore(self) -> None:
        """May be called several times."""
        trainer = self._trainer
        with torch.no_grad():
            for parameter, value, grad in self._parameters:
                _local(parameter).copy_(value)
                parameter.grad = grad
            for part, name, buffer, value in self._buffers:
                _local(buffer).copy_(value)
                part._buffers[name] = buffer
        for part, training in self._modes:
            part.training = training
        load_metric_states(trainer.lightning_module, self._metrics, trainer.strategy.device)
        for optimizer, contents in self._optimizers:
            _put_back(optimizer, copy.deepcopy(contents))
        if self._precision:
            trainer.precision_plugin.load_state_dict(copy.deepcopy(self._precision))
        for generator, state in self._generators:
            generator.set_state(state)
        set_rng_state(self._rng)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return _local(tensor.detach()).to("cpu", copy=True)


def _contents(optimizer: Optimizer) -> tuple[list[Any], list[dict[str, Any]]]:
    """State by parameter, in order, and groups without their parameters."""
    groups = [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [copy.deepcopy(optimizer.state.get(p)) for p in parameters], groups


def _put_back(optimizer: Optimizer, contents: tuple[list[Any], list[dict[str, Any]]]) -> None:
    states, groups = contents
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    optimizer.state.update({p: s for p, s in zip(parameters, states, strict=True) if s is not None})
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key in set(group) - set(saved) - {"params"}:
            del group[key]
        group.update(saved)


def _generators(loader: Any) -> list[torch.Generator]:
    """Of a DataLoader and its samplers, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for part in parts if isinstance(g := getattr(part, "generator", None), torch.Generator)}
    return list(found.values())
