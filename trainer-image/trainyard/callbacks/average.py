"""An average of a module's weights over time, beside the module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn

from trainyard.errors import MisconfigurationException

Tensors = list[torch.Tensor]


class Average:
    """Over the parameters of `module` and, with `use_buffers`, its buffers; without, these are as in the module.

    What torch.optim.swa_utils.AveragedModel does, which takes the same functions: `avg_fn(average, new, count)` for a
    tensor, or `multi_avg_fn(averages, news, count)` for a list of them (default: the equal average). But only tensors are
    copied, not the module with all that hangs on it; integers, which count something, are taken over and not averaged;
    and no update waits for the device. On `device`; None: where each tensor is.
    """

    def __init__(
        self, module: torch.nn.Module, device: torch.device | None = None, *, use_buffers: bool = True,
        avg_fn: Callable[..., Any] | None = None, multi_avg_fn: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        if avg_fn is not None and multi_avg_fn is not None:
            raise MisconfigurationException("avg_fn and multi_avg_fn: give one of them")
        if avg_fn is None and multi_avg_fn is None:
            multi_avg_fn = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        self._one, self._many = avg_fn, multi_avg_fn
        self._names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        self._parameters = len(list(module.parameters()))
        self._use_buffers = use_buffers
        self._tensors = [tensor.to(device or tensor.device, copy=True) for tensor in _tensors(module)]
        self.count = 0
        """Updates."""

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Take the weights in as they are now."""
        groups: dict[Any, tuple[Tensors, Tensors]] = defaultdict(lambda: ([], []))
        for number, (new, average) in enumerate(self._pairs(module)):
            averaged = number < self._parameters or self._use_buffers
            number_like = average.is_floating_point() or average.is_complex()
            if not (self.count and averaged and number_like):
                average.copy_(new)
                continue
            averages, news = groups[average.device, average.dtype]
            averages.append(average)
            news.append(new.to(average.device))
        for averages, news in groups.values():
            if self._many is not None:
                self._many(averages, news, self.count)
            elif self._one is not None:
                for average, new in zip(averages, news, strict=True):
                    average.copy_(self._one(average, new, self.count))
        self.count += 1

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        for own, average in self._pairs(module):
            own.copy_(average)

    @torch.no_grad()
    def swap(self, module: torch.nn.Module) -> None:
        """In place: optimizers, DDP's buckets and compiled code go on with the same tensors."""
        for own, average in self._pairs(module):
            before = own.clone()
            own.copy_(average)
            average.copy_(before)

    @torch.no_grad()
    def share_buffers(self, broadcast: Callable[[Any], Any]) -> None:
        """Collective: rank 0's for all. DDP makes parameters equal on all ranks, but a buffer only until a rank writes it."""
        buffers = self._tensors[self._parameters :]
        if buffers:
            for own, first in zip(buffers, broadcast([buffer.cpu() for buffer in buffers]), strict=True):
                own.copy_(first)

    def state(self) -> dict[str, torch.Tensor]:
        """By the names of the module's parameters and buffers."""
        return dict(zip(self._names, self._tensors, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor] | None, count: int) -> None:
        """None: the tensors are right already."""
        self.count = count
        if state is not None:
            for name, tensor in self.state().items():
                tensor.copy_(state[name])

    def _pairs(self, module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(the module's, the average's)."""
        return zip(_tensors(module), self._tensors, strict=True)


def _tensors(module: torch.nn.Module) -> Tensors:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
