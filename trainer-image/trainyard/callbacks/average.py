"""An average of a module's weights over time, beside the module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel


class Average:
    """torch.optim.swa_utils.AveragedModel over the tensors of `module` alone, without a copy of all that hangs on it.

    `kwargs` go there. On `device`; None: where each tensor is.
    """

    def __init__(
        self, module: torch.nn.Module, device: torch.device | None = None, *, use_buffers: bool = True, **kwargs: Any
    ) -> None:
        # AveragedModel goes through parameters, then buffers, each in the order of these.
        tensors = torch.nn.Module()
        for number, parameter in enumerate(module.parameters()):
            tensors.register_parameter(f"parameter{number}", parameter)
        for number, buffer in enumerate(module.buffers()):
            tensors.register_buffer(f"buffer{number}", buffer)
        self._model = AveragedModel(tensors, device=device, use_buffers=use_buffers, **kwargs)
        self._names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        self.count = 0
        """Updates. AveragedModel's own count may be on a device, and to ask it would wait for that."""

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Take the weights in as they are now."""
        self._model.update_parameters(module)
        self.count += 1

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        for own, averaged in self._pairs(module):
            own.copy_(averaged)

    @torch.no_grad()
    def swap(self, module: torch.nn.Module) -> None:
        """In place: optimizers, DDP's buckets and compiled code go on with the same tensors."""
        for own, averaged in self._pairs(module):
            before = own.clone()
            own.copy_(averaged)
            averaged.copy_(before)

    def state(self) -> dict[str, torch.Tensor]:
        """By the names of the module's parameters and buffers."""
        return dict(zip(self._names, self._tensors(self._model.module), strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor] | None, count: int) -> None:
        """None: the tensors are right already."""
        self.count = count
        self._model.n_averaged.fill_(count)
        for name, tensor in zip(self._names, self._tensors(self._model.module), strict=True):
            if state is not None:
                tensor.copy_(state[name])

    def _pairs(self, module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(the module's, the average's)."""
        return zip(self._tensors(module), self._tensors(self._model.module), strict=True)

    @staticmethod
    def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
        return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
