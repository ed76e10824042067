"""What the ranks of the strategy tests do: `strategy_ranks.py CASE FOLDER`, one process a rank.

Each case is a function that returns what the test wants to see of its rank; it is saved as FOLDER/rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trainyard as L
from trainyard.environment import Place
from trainyard.plugins.precision import make_precision
from trainyard.strategies import make_strategy
from trainyard.strategies.base import Strategy

GLOBAL_BATCH = 12  # for worlds of 1, 2, 3


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


class Net(L.LightningModule):
    """Sizes that no number of ranks divides, a parameter of the module itself, and a tied one."""

    def __init__(self, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.batch_norm = batch_norm
        self.seen: list[int] = []

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.body = nn.ModuleList([nn.Linear(5, 7), Block(7), Block(7)])
            self.norm = nn.BatchNorm1d(7) if self.batch_norm else nn.Identity()
            self.head = nn.Linear(7, 7)
            self.tied = nn.Linear(7, 7, bias=False)
            self.tied.weight = self.head.weight
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("offset", torch.tensor(0.5))
            self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = layer(x)
        return self.tied(self.head(self.norm(x)))[:, :3] * self.scale + self.offset

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch_idx)
        self.steps += 1
        return self.loss(batch)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        out = self(batch)
        return out.to(torch.promote_types(out.dtype, torch.float32)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.05)


def connected(strategy: Strategy | str, precision: Any = None) -> Strategy:
    made = make_strategy(strategy, Place.from_env(), "cpu")
    made.precision = make_precision(precision)
    made.connect()
    return made


def prepared(strategy: Strategy, module: Net, seed: int = 7) -> torch.optim.Optimizer:
    torch.manual_seed(seed)
    with strategy.init_context():
        module.configure_model()
    strategy.setup(module, training=True)
    (optimizer,) = strategy.setup_optimizers(module, [module.configure_optimizers()])
    return optimizer


def share(strategy: Strategy, number: int) -> torch.Tensor:
    """This rank's part of the global batch."""
    generator = torch.Generator().manual_seed(100 + number)
    whole = torch.randn(GLOBAL_BATCH, 5, generator=generator, dtype=torch.float32)
    shares = strategy.distributed_sampler_kwargs
    return whole.chunk(shares["num_replicas"])[shares["rank"]]


def train(
    strategy: Strategy, module: Net, optimizer: torch.optim.Optimizer, steps: range, *, accumulate: int = 1,
    clip: tuple[float, str] | None = None, validate: bool = False,
) -> list[float]:  # fmt: skip
    """What the fit loop does, in few lines; returns the losses over all ranks."""
    precision, losses = strategy.precision, []
    run, check = strategy.step(module, "training_step"), strategy.step(module, "validation_step")

    def forward_backward(number: int) -> torch.Tensor:
        batch = precision.convert_input(share(strategy, number))
        with precision.forward_context(strategy.device):
            loss = run(batch, number)
        strategy.backward(module, precision.scale(loss / accumulate))
        return loss

    for number in steps:
        for early in range(accumulate - 1):
            with strategy.no_sync():
                forward_backward(number * accumulate + early)

        def closure(number: int = number) -> torch.Tensor:
            loss = forward_backward((number + 1) * accumulate - 1)
            precision.unscale(optimizer)
            if clip is not None:
                strategy.clip_gradients(module, optimizer, *clip)
            return loss

        loss = strategy.optimizer_step(optimizer, closure)
        optimizer.zero_grad()
        losses.append(float(strategy.reduce(loss.detach(), reduce_op="mean")))
        if validate:
            with torch.no_grad(), precision.forward_context(strategy.device):
                check(precision.convert_input(share(strategy, number)), number)
    return losses


def result(strategy: Strategy, module: Net, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    """Everything whole, from rank 0."""
    return {
        "model": strategy.model_state(module), "optimizer": strategy.optimizer_state(module, optimizer), **more
    }  # fmt: skip


def whole_run(
    strategy: Strategy | str,
    *,
    steps: int = 4,
    precision: Any = None,
    batch_norm: bool = False,
    **options: Any,
) -> dict[str, Any]:
    strategy = connected(strategy, precision)
    if batch_norm:
        from trainyard.plugins import TorchSyncBatchNorm

        strategy.layer_sync = TorchSyncBatchNorm()
    module = Net(batch_norm=batch_norm)
    optimizer = prepared(strategy, module)
    losses = train(strategy, module, optimizer, range(steps), **options)
    found = result(strategy, module, optimizer, losses=losses)
    strategy.teardown(module)
    found["after"] = module.state_dict()
    return found


def main(case: Callable[[], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    found = case()
    torch.save(found, folder / str(Place.from_env().rank))
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.trainer import strategy_cases

    main(getattr(strategy_cases, sys.argv[1]), Path(sys.argv[2]))
