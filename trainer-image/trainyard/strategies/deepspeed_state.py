"""State that DeepSpeed's ZeRO has spread over the ranks, as if there was one process, and back.

The whole state means that a run can go on with another number of ranks, another stage, or another strategy. Everything
here is collective, and all ranks have the state that they load. `deepspeed.utils` has functions for all that belongs to
one parameter; where the flat tensors of a rank must be found, this reaches into the two optimizers of
deepspeed.runtime.zero, to which `tests/trainer/test_deepspeed.py` holds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Groups:
    """The groups of an optimizer before ZeRO takes its parameters away: options that stay in use, and parameters."""

    options: list[dict[str, Any]]
    parameters: list[list[nn.Parameter]]
    trained: set[int] = field(default_factory=set)
    """Ids of the parameters that ZeRO has a part of."""

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> Groups:
        groups = [list(group["params"]) for group in optimizer.param_groups]
        return cls(
            list(optimizer.param_groups),
            groups,
            {id(p) for group in groups for p in group if p.requires_grad},
        )


# ---- weights


def whole_weight(parameter: torch.Tensor, trained: set[int]) -> torch.Tensor:
    """The unsharded tensor, in the 32 bit of the optimizer's copy where it has one."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if id(parameter) in trained:
        found = safe_get_full_fp32_param(parameter)
        if found is not None:
            return found.detach()  # type: ignore[no-any-return]
    if not _is_partitioned(parameter):
        return parameter.detach()
    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def whole_model(module: nn.Module, trained: set[int], *, keep: bool) -> dict[str, Any]:
    """`module.state_dict()` with whole tensors on the CPU; {} where `keep` is False."""
    state: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            if id(value) not in seen:
                full = whole_weight(value, trained)
                seen[id(value)] = full.to("cpu", copy=True) if keep else None
            state[name] = seen[id(value)]
        else:
            state[name] = value.detach() if isinstance(value, torch.Tensor) else value
    return state if keep else {}


def load_model(module: nn.Module, state: dict[str, Any], *, strict: bool) -> None:
    """`module.load_state_dict`, layer by layer where parameters are partitioned. Raises RuntimeError as that does."""
    from deepspeed.runtime.zero import GatheredParameters

    if not any(_is_partitioned(p) for p in module.parameters()):
        module.load_state_dict(state, strict=strict)
        return
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        own = list(part.parameters(recurse=False))
        with GatheredParameters(own, modifier_rank=0, enabled=bool(own)):
            part._load_from_state_dict(state, prefix, {}, strict, missing, [], errors)
    known = set(module.state_dict(keep_vars=True))
    unexpected = [name for name in state if name not in known]
    if strict and (missing or unexpected):
        errors.append(
            f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}"
        )
    if errors:
        raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__}: {'; '.join(errors)}")


def load_masters(module: nn.Module, state: dict[str, Any], trained: set[int], rank: int) -> None:
    """The optimizer's own copies of the weights."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, parameter in module.named_parameters():
        if id(parameter) not in trained or name not in state:
            continue
        value = state[name].to(torch.float32)
        if _is_partitioned(parameter):
            safe_set_local_fp32_param(parameter, _part(value, parameter, rank))
        else:
            safe_set_full_fp32_param(parameter, value)


# ---- optimizer


def whole_optimizer(zero: Any, groups: Groups, *, keep: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` of the optimizer before it was given to ZeRO; {} where `keep` is False."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(zero)
    state: dict[int, dict[str, Any]] = {}
    packed: list[dict[str, Any]] = []
    number = 0
    for index, parameters in enumerate(groups.parameters):
        numbers = list(range(number, number + len(parameters)))
        number += len(parameters)
        options = {key: value for key, value in groups.options[index].items() if key != "params"}
        packed.append({**options, "params": numbers})
        for place, parameter in zip(numbers, parameters, strict=True):
            if id(parameter) not in groups.trained:
                continue
            flat = _flat(zero, groups, index, parameter)
            entry: dict[str, Any] = {}
            for key, value in zero.optimizer.state.get(flat, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == flat.shape:
                    full = safe_get_full_optimizer_state(parameter, key)
                    entry[key] = full.to("cpu", copy=True) if keep else None
                else:
                    entry[key] = value.detach().clone() if isinstance(value, torch.Tensor) else value
            if entry:
                state[place] = entry
    return {"state": state, "param_groups": packed} if keep else {}


def load_whole_optimizer(zero: Any, groups: Groups, saved: dict[str, Any], rank: int) -> None:
    """Parameters are matched by position, as Optimizer.load_state_dict does. Raises ValueError as that does."""
    counts = [len(group["params"]) for group in saved["param_groups"]]
    if counts != [len(group) for group in groups.parameters]:
        raise ValueError(
            f"loaded state dict has groups of {counts} parameters, the optimizer of "
            f"{[len(group) for group in groups.parameters]}"
        )
    entries: list[tuple[int, nn.Parameter, dict[str, Any]]] = []
    for index, (options, group) in enumerate(zip(groups.options, saved["param_groups"], strict=True)):
        options.update({key: value for key, value in group.items() if key != "params"})
        for number, parameter in zip(group["params"], groups.parameters[index], strict=True):
            if id(parameter) in groups.trained and number in saved["state"]:
                entries.append((index, parameter, saved["state"][number]))
    zero.optimizer.state.clear()
    _make_room(zero, groups, entries)
    for _, parameter, entry in entries:
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.numel() == _numel(parameter):
                _set(parameter, key, value, rank)


def _make_room(
    zero: Any, groups: Groups, entries: Iterable[tuple[int, nn.Parameter, dict[str, Any]]]
) -> None:
    """An optimizer has no state before its first step."""
    for index, parameter, entry in entries:
        flat = _flat(zero, groups, index, parameter)
        have = zero.optimizer.state[flat]
        for key, value in entry.items():
            whole = isinstance(value, torch.Tensor) and value.dim() and value.numel() == _numel(parameter)
            if whole:
                if key not in have:
                    have[key] = torch.zeros_like(flat)
            else:
                have[key] = value.clone() if isinstance(value, torch.Tensor) else value
    _link(zero)


def _link(zero: Any) -> None:
    """Have stages 1 and 2 find each parameter's part of the states. They do so by themselves after the first group's first
    step, when there are none of the other groups yet."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        if zero.optimizer.state:
            zero._lazy_init_hp_params_optimizer_state()


def _set(parameter: nn.Parameter, key: str, value: torch.Tensor, rank: int) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if _is_partitioned(parameter):
        safe_set_local_optimizer_state(parameter, _part(value, parameter, rank), key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _flat(zero: Any, groups: Groups, index: int, parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of the group that `parameter` is in: what the optimizer knows as its parameter."""
    if _is_partitioned(parameter):
        sub_group = zero.grad_position[zero.get_param_id(parameter)][0]
        return zero.fp32_partitioned_groups_flat[sub_group]  # type: ignore[no-any-return]
    # DeepSpeed drops groups without parameters.
    place = sum(1 for group in groups.parameters[:index] if group)
    return zero.single_partition_of_fp32_groups[place]  # type: ignore[no-any-return]


def _is_partitioned(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _numel(parameter: Any) -> int:
    return int(parameter.ds_numel if _is_partitioned(parameter) else parameter.numel())


def _part(value: torch.Tensor, parameter: Any, rank: int) -> torch.Tensor:
    """This rank's part of `value` under stage 3, filled up with zeros. deepspeed's setter of whole values takes none that
    the number of ranks does not divide."""
    size = parameter.ds_tensor.numel()
    part = value.new_zeros(size)
    mine = value.flatten()[rank * size : (rank + 1) * size]
    part[: mine.numel()] = mine
    return part


# ---- after a run


def plain(module: nn.Module, weights: dict[int, torch.Tensor]) -> None:
    """Give `module` parameters of its own again: `weights` by the ids of those that it has."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        if type(part._parameters) is not dict:  # stage 3 looks into it for parameters that are used elsewhere
            part._parameters = dict(part._parameters.items())
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(weights[id(parameter)], parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]
