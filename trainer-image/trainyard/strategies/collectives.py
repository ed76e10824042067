"""Collectives that gradients go through. torch.distributed.nn.functional is deprecated since torch 2.15."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        out = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


def all_reduce(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
    """The sum over all ranks; its gradient is the sum of the ranks' gradients."""
    out: torch.Tensor = _AllReduce.apply(tensor, group)
    return out


def all_gather(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
    """(world, *tensor.shape); a rank's gradient is the sum of what all ranks have for its part."""
    out: torch.Tensor = _AllGather.apply(tensor, group)
    return out
