"""The seam between the loops and where they run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from trainyard.peers import Alone, Peers
from trainyard.plugins.precision.base import Precision
from trainyard.strategies.facade import StrategyFacade
from trainyard.strategies.materialize import materialize, without_init

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from trainyard.core.module import LightningModule
    from trainyard.plugins.layer_sync import LayerSync

Step = Callable[..., Any]


class Strategy(StrategyFacade):
    """One process on one device; the others override what differs.

    Called in this order: `connect` once; for each fit, validate, test or predict: `setup`, and for a fit also
    `setup_optimizers`, `load_*` on a resume; then the loop's methods; `teardown`; `disconnect` at the end.
    """

    name: str = "single"
    launch: str | None = None
    """How a script that torchrun did not start gets its other processes: None (it is one), "popen", "spawn", "fork"."""
    forward_is_collective: bool = False
    """Whether a forward pass waits for the other ranks (sharded parameters): then all must do the same number."""
    allows_inference_mode: bool = True
    plain_backward: bool = True
    """Whether `backward` is the module's, which is `loss.backward()` unless that is overridden."""
    failed: bool = False
    """Set by the Trainer: then nobody waits for the other ranks any more."""
    replicates_parameters: bool = False
    """Whether all processes hold all parameters, bit for bit alike."""
    takes_virtual_ranks: bool = False
    """Whether it computes by virtual ranks (`virtual_ranks`): it leaves the gradients to the loop then."""
    has_engine: bool = False
    """Whether an engine behind it keeps weights and optimizer states in a form of its own (deepspeed): only `model_state`
    and `optimizer_state` show them."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = Precision()
        self.peers: Peers = Alone()
        self.layer_sync: LayerSync | None = None
        """`Trainer(sync_batchnorm=True)`: used where there are several processes."""
        self._module: LightningModule | None = None

    # ---- where

    def connect(self) -> None:
        """Find the other processes. May be called again. Raises what torch.distributed raises, within the time-out, and
        MisconfigurationException when the accelerator that was asked for is not there.
        """
        self.kind.setup_device(self.device)

    def disconnect(self) -> None:
        """After what succeeded."""

    # ---- model and optimizers

    @contextlib.contextmanager
    def init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Around configure_model: may put new layers on the meta device, or into a default dtype.

        `empty_init`: torch.nn.init does nothing, for weights that are loaded afterwards anyhow.
        """
        with self.precision.init_context(), without_init() if empty_init else contextlib.nullcontext():
            yield

    def setup(self, module: LightningModule, *, training: bool) -> None:
        """Convert, move and wrap `module`."""
        self._module = module
        self.precision.connect(self.device)
        self.precision.convert_module(module)
        if any(p.is_meta for p in module.parameters()):
            materialize(module, self.device)
        module.to(self.device)

    def step(self, module: LightningModule, name: str) -> Step:
        """What to call for "training_step", "validation_step", "test_step" or "predict_step"."""
        return getattr(module, name)  # type: ignore[no-any-return]

    def setup_optimizers(self, module: LightningModule, optimizers: list[Optimizer]) -> list[Optimizer]:
        """What to use in their place. After `setup`: the parameters are those that will be trained."""
        return optimizers

    def trainable_changed(self, module: LightningModule) -> None:
        """Within a fit, between two steps, other parameters have come to require gradients. Collective."""

    def teardown(self, module: LightningModule) -> None:
        """Unwrap: afterwards the module holds plain, whole parameters again where that is possible. Collective, and not
        for what failed.
        """

    # ---- a step

    def backward(self, module: LightningModule, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """`loss` is scaled already."""
        module.backward(loss, *args, **kwargs)

    def begin_manual(self, module: LightningModule) -> None:
        """The module runs backward itself, inside of its training_step."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """Around batches after which the optimizer does not step."""
        return contextlib.nullcontext()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """See `Precision.optimizer_step`. `kwargs`: what manual optimization gives to `step`."""
        return self.precision.optimizer_step(optimizer, closure, **kwargs)

    def clip_gradients(
        self, module: LightningModule, optimizer: Optimizer, value: float, algorithm: str
    ) -> None:
        """By global norm ("norm") or element-wise ("value"), over all shards of the gradients."""
        import torch

        self.precision.unscale(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, value)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, value)

    # ---- between the ranks

    def reduce_values(self, values: torch.Tensor, op: str, group: Any = None) -> torch.Tensor:
        """Over all ranks: "mean", "sum", "min", "max" or "product". A new tensor."""
        return values

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """(world, *tensor.shape); (*tensor.shape) in a world of one, as Lightning's."""
        return tensor

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Rank `src`'s object, of any kind that can be pickled."""
        return obj

    def broadcast_tensors(self, tensors: list[torch.Tensor]) -> None:
        """Rank 0's values into everybody's tensors, which are alike but for the values."""

    def barrier(self, name: str | None = None) -> None:
        """All ranks come here. `name` is for the reader."""
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

    # ---- state as it lies, for checkpoints that each rank writes its part of. Not collective, but where a strategy can
    # only do it by gathering. What is loaded may have DTensors, too: `load_model_state`, `load_optimizer_state`.

    gathers_state: bool = False
    """Whether the two below gather on rank 0: then no rank can save by itself."""

    def own_model_state(self, module: LightningModule) -> dict[str, Any]:
        """As `model_state`, of what this rank has: sharded tensors are DTensors."""
        return self.model_state(module)

    def own_optimizer_state(self, module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
        """As `optimizer_state`, of what this rank has: sharded tensors are DTensors."""
        return self.optimizer_state(module, optimizer)

    def sharded_parameters(self, module: LightningModule) -> dict[str, torch.Tensor]:
        """The DTensors among `module.state_dict()`, after `setup`."""
        return {}
