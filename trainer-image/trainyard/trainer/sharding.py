"""How the tensors of a checkpoint are wanted on this rank, and which of them any rank could write."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainyard.core.portable import OWN

if TYPE_CHECKING:
    import torch

    from trainyard.checkpoint.loading import Layout
    from trainyard.trainer.trainer import Trainer

_MODEL = re.compile(r"checkpoint\.(?:state_dict|current_model_state)\.(.+)")
_OPTIMIZER = re.compile(r"checkpoint\.optimizer_states\.(\d+)\.state\.(\d+)\.[^.]+")


def optimizer_names(trainer: Trainer) -> list[list[str]]:
    """The name of each parameter of each optimizer, in the order of the optimizer's state; "" for what is not the module's."""
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    return [
        [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]
        for optimizer in trainer.optimizers
    ]


def expected_bytes(trainer: Trainer) -> int:
    """About what this rank will write in a save: its parameters, and twice as much for the optimizers, as Adam keeps."""
    return _share_of(trainer, 3 * list(trainer.lightning_module.parameters()))


def layout(trainer: Trainer) -> Layout:
    """Parameters and what the optimizers keep of them lie as the module's are sharded now; all else is wanted whole."""
    sharded = trainer.strategy.sharded_parameters(trainer.lightning_module)

    def of(checkpoint: dict[str, Any]) -> Callable[[str, tuple[int, ...]], torch.Tensor | None]:
        optimizers = (checkpoint.get(OWN) or {}).get("optimizer_names", [])

        def like(name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
            parameter = ""
            if found := _MODEL.fullmatch(name):
                parameter = found[1]
            elif found := _OPTIMIZER.fullmatch(name):
                number, index = int(found[1]), int(found[2])
                if number < len(optimizers) and index < len(optimizers[number]):
                    parameter = optimizers[number][index]
            template = sharded.get(parameter)
            return template if template is not None and tuple(template.shape) == shape else None

        return like

    return of


def size_of_shard(trainer: Trainer) -> int:
    """Bytes of this rank's part of weights and optimizer states, about."""
    import torch

    held: list[torch.Tensor] = list(trainer.lightning_module.parameters())
    held += [
        value
        for optimizer in trainer.optimizers
        for kept in optimizer.state.values()
        for value in kept.values()
        if isinstance(value, torch.Tensor)
    ]
    return _share_of(trainer, held)


def _share_of(trainer: Trainer, held: list[torch.Tensor]) -> int:
    """Bytes that this rank writes of tensors that it holds."""
    local = [getattr(t, "_local_tensor", t) for t in held if not t.is_meta]
    size = sum(t.numel() * t.element_size() for t in local)
    return size // trainer.world_size if trainer.strategy.replicates_parameters else size


def replicated(trainer: Trainer, checkpoint: dict[str, Any]) -> frozenset[str]:
    """The tensors of `checkpoint` that all ranks have bit for bit: parameters that were trained alike, and what the
    optimizers keep of them. Not buffers: each rank's are of its own batches, and rank 0's count.
    """
    if not trainer.strategy.replicates_parameters or trainer.world_size == 1:
        return frozenset()
    state = checkpoint["state_dict"]
    found = {
        f"checkpoint.state_dict.{name}"
        for name, parameter in trainer.lightning_module.named_parameters(remove_duplicate=False)
        # A callback may have put another tensor there.
        if name in state and state[name].data_ptr() == parameter.data_ptr()
    }
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", ())):
        for index, entries in optimizer["state"].items():
            found |= {f"checkpoint.optimizer_states.{number}.state.{index}.{key}" for key in entries}
    return frozenset(found)
