"""State of sharded parameters as if there was one process, and back: torch.distributed.tensor.DTensor to and from whole
tensors. Collective: all ranks of the parameters' meshes call, in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer


def whole(tensor: torch.Tensor, *, keep: bool = True) -> torch.Tensor:
    """The unsharded tensor on the CPU; where `keep` is False, an empty one, so that not all ranks hold the model."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    kind = tensor.device_mesh.device_type
    # With cpu_offload the shards are on the CPU, and the mesh speaks through the device.
    shard = tensor.detach() if tensor.device.type == kind else tensor.detach().to(kind)
    full: torch.Tensor = shard.full_tensor()  # type: ignore[attr-defined]
    return full.cpu() if keep else full.new_empty(0, device="cpu")


def like(value: torch.Tensor, sharded: torch.Tensor) -> torch.Tensor:
    """This rank's part of the whole tensor `value`, laid out as `sharded` is. Every rank has `value`."""
    if not isinstance(sharded, DTensor) or isinstance(value, DTensor):
        return value
    mesh = sharded.device_mesh
    placements = sharded.placements if value.shape == sharded.shape else [Replicate()] * mesh.ndim
    # From the whole value that this rank has itself: nothing is sent.
    part = distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)
    return part.to(sharded.device)


def whole_model(module: torch.nn.Module, *, keep: bool) -> dict[str, Any]:
    """`module.state_dict()` with whole tensors; {} where `keep` is False."""
    state = module.state_dict()
    full = {name: whole(value, keep=keep) if _is_tensor(value) else value for name, value in state.items()}
    return full if keep else {}


def load_whole_model(module: torch.nn.Module, state: dict[str, Any], *, strict: bool) -> None:
    have = module.state_dict()
    module.load_state_dict(
        {
            name: like(value, have[name]) if name in have and _is_tensor(value) else value
            for name, value in state.items()
        },
        strict=strict,
    )


def whole_optimizer(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors; {} where `keep` is False."""
    saved = optimizer.state_dict()
    state = {
        index: {name: whole(v, keep=keep) if _is_tensor(v) else v for name, v in entries.items()}
        for index, entries in saved["state"].items()
    }
    return {**saved, "state": state} if keep else {}


def load_whole_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Parameters are matched by position, as Optimizer.load_state_dict does."""
    numbers = [index for group in saved["param_groups"] for index in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=False))

    def entry(index: Any, name: str, value: Any) -> Any:
        if not _is_tensor(value) or value.dim() == 0 or index not in by_number:
            return value  # a step counter: the same on all ranks
        return like(value, by_number[index])

    state = {
        index: {name: entry(index, name, value) for name, value in entries.items()}
        for index, entries in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def clip_norm(parameters: Iterable[torch.Tensor], max_norm: float) -> None:
    """torch.nn.utils.clip_grad_norm_ for parameters that do not all live on one mesh."""
    by_mesh: dict[Any, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    if len(by_mesh) < 2:
        torch.nn.utils.clip_grad_norm_([p for group in by_mesh.values() for p in group], max_norm)
        return
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        for group in by_mesh.values()
    ]
    total = torch.linalg.vector_norm(
        torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms])
    )
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
