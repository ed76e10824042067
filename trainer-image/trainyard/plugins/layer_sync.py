"""Batch normalisation over the batches of all processes: `Trainer(sync_batchnorm=True)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class LayerSync(ABC):
    """`lightning.pytorch.plugins.LayerSync`: exchanges layers before training, and puts them back afterwards."""

    @abstractmethod
    def apply(self, model: nn.Module) -> nn.Module:
        """Before the model is wrapped, and its parameters given to an optimizer."""

    @abstractmethod
    def revert(self, model: nn.Module) -> nn.Module:
        """The model as it was, with what its layers learnt."""


class TorchSyncBatchNorm(LayerSync):
    """torch.nn.SyncBatchNorm, and the same for the CPU, where torch has none."""

    def __init__(self) -> None:
        self.on_cpu = False
        """Set by the strategy."""
        self._exchanged: list[tuple[nn.Module, str, _BatchNorm]] = []
        """Parent, name, and the layer that was there."""

    def apply(self, model: nn.Module) -> nn.Module:
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm):
                    self._exchanged.append((parent, name, layer))
                    setattr(
                        parent,
                        name,
                        _synchronised(layer, _CPUSyncBatchNorm if self.on_cpu else nn.SyncBatchNorm),
                    )
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for parent, name, layer in self._exchanged:
            _share(getattr(parent, name), layer)
            setattr(parent, name, layer)
        self._exchanged.clear()
        return model


class _CPUSyncBatchNorm(_BatchNorm):
    """Mean and variance from sums over all processes. No SyncBatchNorm by name: DDP refuses those on the CPU."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training and self.track_running_stats:
            return super().forward(input)
        self._check_input_dim(input)
        return self._normalise(input)

    def _normalise(self, input: torch.Tensor) -> torch.Tensor:
        from trainyard.strategies.collectives import all_reduce

        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        others = [axis for axis in range(values.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(values.dim())]
        count = values.new_full((1,), values.numel() / values.size(1))
        # Around the mean, in two rounds: a variance from sums of squares loses its digits where the mean is large.
        sums = all_reduce(torch.cat([values.sum(others), count]))
        mean, total = sums[:-1] / sums[-1], sums[-1].detach()
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().sum(others)) / total
        self._track(mean.detach(), variance.detach(), total)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        """Running statistics as torch.nn.BatchNorm keeps them: the unbiased variance, cumulative without momentum."""
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None  # noqa: S101 - there is one where there is a running mean
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        unbiased = variance * count / (count - 1)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def _synchronised(layer: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    sync = kind(
        layer.num_features, eps=layer.eps, momentum=layer.momentum, affine=layer.affine,
        track_running_stats=layer.track_running_stats,
    )  # fmt: skip
    _share(layer, sync)
    sync.training = layer.training
    return sync


def _share(source: nn.Module, target: nn.Module) -> None:
    """`target` gets the very parameters and buffers of `source`."""
    stores: tuple[str, ...] = ("_parameters", "_buffers")
    for store in stores:
        held: dict[str, Any] = getattr(target, store)
        held.update(getattr(source, store))
