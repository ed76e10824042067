"""What strategies have in common whose parameters are spread over the processes as DTensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.strategies.base import Step
from trainyard.strategies.parallel import ParallelStrategy

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from trainyard.core.module import LightningModule

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class ShardedStrategy(ParallelStrategy):
    """Steps gather what they need; gradients are clipped over all shards; state is whole, and rank 0's only."""

    forward_is_collective = True
    allows_inference_mode = False
    """What is gathered in inference mode can never be trained with (torch: inference tensors)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mesh: DeviceMesh | None = None

    @property
    def device_mesh(self) -> DeviceMesh:
        """After `connect`. Raises RuntimeError before."""
        if self._mesh is None:
            raise RuntimeError("device_mesh: there is none before the processes are connected")
        return self._mesh

    def connect(self) -> None:
        super().connect()
        if self._mesh is None:
            self._mesh = self.make_mesh()

    def make_mesh(self) -> DeviceMesh:
        """Collective. Raises MisconfigurationException."""
        raise NotImplementedError

    def disconnect(self) -> None:
        super().disconnect()
        self._mesh = None

    # ---- steps

    def register_steps(self, module: Any) -> None:
        """The steps under other names, gathering the parameters that are `module`'s own around themselves.

        Not under their own: torch's wrapper hides how many arguments a step takes.
        """
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        for name in STEPS if isinstance(module, FSDPModule) else ():
            if callable(getattr(module, name, None)):
                setattr(module, _sharded(name), getattr(module, name))
                register_fsdp_forward_method(module, _sharded(name))

    def forget_steps(self, module: LightningModule) -> None:
        for name in STEPS:
            module.__dict__.pop(_sharded(name), None)

    def step(self, module: Any, name: str) -> Step:
        method: Step | None = getattr(module, _sharded(name), None)
        if method is None or name == "training_step":
            return method or super().step(module, name)

        def run(*args: Any) -> Any:
            """No backward pass will free what was gathered, and whoever looks at the parameters wants to see shards."""
            try:
                return method(*args)
            finally:
                module.reshard()

        return run

    def clip_gradients(
        self, module: LightningModule, optimizer: Optimizer, value: float, algorithm: str
    ) -> None:
        from trainyard.strategies.sharded_state import clip_norm

        if algorithm == "value":
            super().clip_gradients(module, optimizer, value, algorithm)
            return
        self.precision.unscale(optimizer)
        clip_norm([p for group in optimizer.param_groups for p in group["params"]], value)

    # ---- state

    def model_state(self, module: LightningModule) -> dict[str, Any]:
        from trainyard.strategies.sharded_state import whole_model

        return whole_model(module, keep=self.is_global_zero)

    def load_model_state(
        self, module: LightningModule, state: dict[str, Any], *, strict: bool = True
    ) -> None:
        from trainyard.strategies.sharded_state import load_whole_model

        load_whole_model(module, state, strict=strict)

    def own_model_state(self, module: LightningModule) -> dict[str, Any]:
        return dict(module.state_dict())

    def own_optimizer_state(self, module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def sharded_parameters(self, module: LightningModule) -> dict[str, torch.Tensor]:
        from torch.distributed.tensor import DTensor

        return {name: value for name, value in module.state_dict().items() if isinstance(value, DTensor)}

    def optimizer_state(self, module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
        from trainyard.strategies.sharded_state import whole_optimizer

        return whole_optimizer(optimizer, keep=self.is_global_zero)

    def load_optimizer_state(
        self, module: LightningModule, optimizer: Optimizer, state: dict[str, Any]
    ) -> None:
        from trainyard.strategies.sharded_state import load_whole_optimizer

        load_whole_optimizer(optimizer, state)


def _sharded(step: str) -> str:
    return f"_sharded_{step}"
