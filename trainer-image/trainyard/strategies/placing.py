"""Parameters and buffers to their device, and to the values of rank 0, before they are sharded."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def place(
    module: nn.Module, device: torch.device, placed: set[nn.Module], *, sync: bool,
    ignored: Collection[nn.Parameter] = (),
) -> None:  # fmt: skip
    """Move what is not in `placed` yet, in place: parameters keep their identity. `sync`: collective over all ranks."""
    whole = {id(parameter) for parameter in ignored}
    for part in set(module.modules()) - placed:
        # Metrics and the like keep tensors that are neither; torch's own override is the recurrent layers'.
        own_way = type(part)._apply is not nn.Module._apply
        if own_way and not any(True for _ in part.parameters()):
            part.to(device)
    with torch.no_grad():
        for tensor in _plain(module, device, placed, whole):
            if sync:
                _broadcast(tensor)
    placed.update(module.modules())


def _plain(
    module: nn.Module, device: torch.device, placed: set[nn.Module], whole: set[int]
) -> Iterator[torch.Tensor]:
    """Every tensor once, moved; those in `whole` are moved and not given."""
    seen: set[int] = set()
    for part in module.modules():
        if part in placed:
            continue
        for parameter in part.parameters(recurse=False):
            if id(parameter) not in seen and not isinstance(parameter, DTensor):
                seen.add(id(parameter))
                parameter.data = parameter.data.to(device)
                if id(parameter) not in whole:
                    yield parameter.data
        for name, buffer in part.named_buffers(recurse=False):
            if id(buffer) not in seen and not isinstance(buffer, DTensor):
                seen.add(id(buffer))
                setattr(part, name, buffer.to(device))
                yield getattr(part, name)


def _broadcast(tensor: torch.Tensor) -> None:
    import torch.distributed as dist

    sent = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous()
    dist.broadcast(sent, src=0)
    if sent.data_ptr() != tensor.data_ptr():
        tensor.copy_(torch.view_as_complex(sent) if tensor.is_complex() else sent)
