"""The seam between the loops and where they run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from trainyard.environment import Place
from trainyard.errors import MisconfigurationException
from trainyard.peers import Alone, Peers
from trainyard.plugins.precision.base import Precision

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from trainyard.core.module import LightningModule

Step = Callable[..., Any]


class Strategy:
    """One process on one device; the others override what differs.

    Called in this order: `connect` once; for each fit, validate, test or predict: `setup`, and for a fit also
    `setup_optimizers`, `load_*` on a resume; then the loop's methods; `teardown`; `disconnect` at the end.
    """

    name: str = "single"
    launch: str | None = None
    """How a script that torchrun did not start gets its other processes: None (it is one), "popen", "spawn", "fork"."""
    accumulates: bool = False
    """Whether the engine behind it divides the loss and counts the batches of an optimizer step itself (deepspeed)."""

    def __init__(self) -> None:
        self.place = Place()
        self.accelerator = "auto"
        self.precision = Precision()
        self.peers: Peers = Alone()
        self._device: torch.device | None = None

    # ---- where

    @property
    def device(self) -> torch.device:
        """Raises MisconfigurationException when the accelerator that was asked for is not there."""
        if self._device is None:
            self._device = pick_device(self.accelerator, self.place.local_rank)
        return self._device

    @property
    def root_device(self) -> torch.device:
        """Lightning's name for `device`."""
        return self.device

    def connect(self) -> None:
        """Find the other processes. Raises what torch.distributed raises, within the time-out."""

    def disconnect(self) -> None:
        """After what succeeded."""

    # ---- model and optimizers

    def init_context(self) -> AbstractContextManager[Any]:
        """Around configure_model: may put new layers on the meta device, or into a default dtype."""
        return self.precision.init_context()

    def setup(self, module: LightningModule, *, training: bool) -> None:
        """Convert, move and wrap `module`."""
        self.precision.convert_module(module)
        module.to(self.device)

    def step(self, module: LightningModule, name: str) -> Step:
        """What to call for "training_step", "validation_step", "test_step" or "predict_step"."""
        return getattr(module, name)  # type: ignore[no-any-return]

    def setup_optimizers(self, module: LightningModule, optimizers: list[Optimizer]) -> list[Optimizer]:
        """What to use in their place. After `setup`: the parameters are those that will be trained."""
        return optimizers

    def teardown(self, module: LightningModule) -> None:
        """Unwrap: afterwards the module holds plain, whole parameters again where that is possible."""

    # ---- a step

    def backward(self, module: LightningModule, loss: torch.Tensor) -> None:
        """`loss` is scaled already."""
        module.backward(loss)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Around batches after which the optimizer does not step."""
        return contextlib.nullcontext()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        """See `Precision.optimizer_step`."""
        return self.precision.optimizer_step(optimizer, closure)

    def clip_gradients(
        self, module: LightningModule, optimizer: Optimizer, value: float, algorithm: str
    ) -> None:
        """By global norm ("norm") or element-wise ("value"), over all shards of the gradients."""
        import torch

        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, value)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, value)

    # ---- between the ranks

    def reduce(self, values: torch.Tensor, op: str, group: Any = None) -> torch.Tensor:
        """Over all ranks: "mean", "sum", "min" or "max"."""
        return values

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """(world, *tensor.shape); (*tensor.shape) in a world of one, as Lightning's."""
        return tensor

    def barrier(self) -> None:
        self.peers.any(False)

    # ---- state, whole and on the CPU or the device, as if there was one process. All collective.

    def model_state(self, module: LightningModule) -> dict[str, Any]:
        """`module.state_dict()` by the names of the unwrapped module. Complete on rank 0; other ranks may get {}."""
        return module.state_dict()

    def load_model_state(
        self, module: LightningModule, state: dict[str, Any], *, strict: bool = True
    ) -> None:
        """Every rank has `state`. Called after `setup`."""
        module.load_state_dict(state, strict=strict)

    def optimizer_state(self, module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
        """`optimizer.state_dict()` as an unsharded optimizer would give it."""
        return optimizer.state_dict()

    def load_optimizer_state(
        self, module: LightningModule, optimizer: Optimizer, state: dict[str, Any]
    ) -> None:
        """The inverse. Every rank has `state`."""
        optimizer.load_state_dict(state)


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
