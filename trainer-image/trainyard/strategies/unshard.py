"""From a module under `fully_shard` back to the plain one that the user made.

torch has no function for it, so this reaches into what fully_shard leaves behind; `tests/trainer/test_strategies_fsdp.py`
holds it to the torch version in use. Where an attribute is not there any more, the module stays sharded.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainyard.strategies.sharded_state import whole

_log = logging.getLogger("trainyard")


def unshard(module: nn.Module) -> None:
    """Collective. Afterwards `module` has its own classes and, on the CPU, whole parameters."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    try:
        for part in list(module.modules()):
            if isinstance(part, FSDPModule):
                _restore(part)
    except (AttributeError, ImportError, KeyError) as error:
        _log.warning(
            "the module stays sharded: this torch (%s) has another fully_shard: %r", torch.__version__, error
        )
        return
    plain: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if id(parameter) not in plain:
                    plain[id(parameter)] = nn.Parameter(whole(parameter), parameter.requires_grad)
                setattr(part, name, plain[id(parameter)])


def _restore(part: Any) -> None:
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    state, sharded = part._get_fsdp_state(), type(part)
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    # torch before 2.12 has one group in each state.
    for group in getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]):
        handles += group._module_to_pre_save_state_dict_hook_handle.values()
        handles += group._module_to_pre_load_state_dict_hook_handle.values()
    for handle in handles:
        handle.remove()
    part.__class__ = sharded.__mro__[getattr(sharded, "_orig_cls_mro_index", 2)]
    for key in (STATE_KEY, REGISTRY_KEY):
        part.__dict__.pop(key, None)
    _module_state_mapping.pop(part, None)
    for inner in part.modules():
        for key in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            inner.__dict__.pop(key, None)
