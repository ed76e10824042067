"""The seam between the loop and where it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from trainyard.environment import Place
from trainyard.errors import MisconfigurationException
from trainyard.peers import Alone, Peers

if TYPE_CHECKING:
    import torch

    from trainyard.core.module import LightningModule

Step = Callable[..., Any]


class Strategy:
    """One process on one device; the others override what differs."""

    def __init__(self) -> None:
        self.place = Place()
        self.accelerator = "auto"
        self.peers: Peers = Alone()
        self._device: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Raises MisconfigurationException when the accelerator that was asked for is not there."""
        if self._device is None:
            self._device = pick_device(self.accelerator, self.place.local_rank)
        return self._device

    def connect(self) -> None:
        """Find the other processes. Raises what torch.distributed raises, within the time-out."""

    def wrap(self, module: LightningModule) -> Step:
        """Move `module` to the device; returns what to call instead of `module.training_step`."""
        module.to(self.device)
        return module.training_step

    def no_sync(self) -> AbstractContextManager[Any]:
        """Around batches after which the optimizer does not step."""
        return contextlib.nullcontext()

    def reduce(self, values: torch.Tensor, op: str) -> torch.Tensor:
        """Over all ranks: "mean", "sum", "min" or "max"."""
        return values

    def barrier(self) -> None:
        self.peers.any(False)

    def disconnect(self) -> None:
        """After a fit that succeeded."""


def pick_device(accelerator: str, local_rank: int) -> torch.device:
    """Raises MisconfigurationException."""
    import torch

    if accelerator == "cpu":
        return torch.device("cpu")
    if accelerator in ("gpu", "cuda", "auto"):
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
            return device
        if accelerator == "auto":
            return torch.device("cpu")
        raise MisconfigurationException(f"accelerator: {accelerator!r}, but torch sees no CUDA device here")
    raise MisconfigurationException(f"accelerator: {accelerator!r} is none of 'auto', 'cpu', 'gpu', 'cuda'")
