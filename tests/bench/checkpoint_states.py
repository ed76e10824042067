"""What `./dev bench checkpoint` saves: a GPT-like model and the states of its AdamW, of a size in bytes.

Number and shapes of the tensors are a real model's: 4 GiB are GPT-2 medium's 24 layers of width 1024, in float32, with two
moments and a step for each parameter. Nothing is trained with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
_SHAPES = ((2048, 24, 1024), (512, 8, 768), (128, 4, 512), (16, 4, 256), (0, 2, 32))
"""(MiB from which on, layers, width)"""
_POSITIONS = 1024
_COPIES = 3
"""A parameter and its two moments."""


@dataclass(slots=True)
class TrainState:
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them, in one order."""
        states = (s for p in self.module.parameters() for s in self.optimizer.state[p].values())
        return [*(p.detach() for p in self.module.parameters()), *states]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def for_dcp(self) -> dict[str, Any]:
        """As users of DCP have it."""
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def in_lightnings_layout(self) -> dict[str, Any]:
        """As a Trainer has it."""
        return {
            "epoch": 0,
            "global_step": 1,
            "state_dict": self.module.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
        }


def make(nbytes: int) -> TrainState:
    """A state of about `nbytes` bytes, every byte of it in memory. Raises ValueError for less than 1 MiB."""
    import torch

    module = model(nbytes)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    fill(module)
    fill_optimizer(optimizer)
    return TrainState(module, optimizer)


def model(nbytes: int) -> torch.nn.Module:
    """Of which the state has about `nbytes` bytes, to within a row of its embedding; with nothing in its parameters yet."""
    import torch

    layers, width = next((n, d) for least, n, d in _SHAPES if nbytes / MIB >= least)
    with torch.device("meta"):
        parts: dict[str, torch.nn.Module] = {
            "positions": torch.nn.Embedding(min(_POSITIONS, 32 * width), width),
            "blocks": torch.nn.ModuleList(_block(width) for _ in range(layers)),
            "norm": torch.nn.LayerNorm(width),
        }
        fixed = sum(p.numel() for part in parts.values() for p in part.parameters())
        rows = (nbytes // (4 * _COPIES) - fixed) // width
        if rows < 1:
            raise ValueError(f"{nbytes} bytes are less than {layers} layers of width {width} take")
        module = torch.nn.ModuleDict({"tokens": torch.nn.Embedding(rows, width), **parts})
    return module.to_empty(device="cpu")


def fill(module: torch.nn.Module) -> None:
    """Give each parameter a value of its own."""
    import torch

    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.fill_(number + 0.5)


def is_filled(module: torch.nn.Module) -> bool:
    """Whether all parameters, or what this rank has of them, are as `fill` leaves them."""
    locals_ = (getattr(p, "_local_tensor", p).detach() for p in module.parameters())
    return all(bool((t == number + 0.5).all()) for number, t in enumerate(locals_))


def fill_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the states of one step, without the gradients of one."""
    import torch

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        optimizer.state[parameter] = {
            "step": torch.tensor(float(number + 1)),
            "exp_avg": torch.full_like(parameter, number + 0.25, requires_grad=False),
            "exp_avg_sq": torch.full_like(parameter, number + 0.125, requires_grad=False),
        }


def _block(width: int) -> torch.nn.Module:
    import torch

    return torch.nn.ModuleDict({
        "norm_1": torch.nn.LayerNorm(width),
        "qkv": torch.nn.Linear(width, 3 * width),
        "out": torch.nn.Linear(width, width),
        "norm_2": torch.nn.LayerNorm(width),
        "up": torch.nn.Linear(width, 4 * width),
        "down": torch.nn.Linear(4 * width, width),
    })  # fmt: skip
