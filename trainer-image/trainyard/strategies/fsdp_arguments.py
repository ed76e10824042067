"""What FSDPStrategy is given, in Lightning's words, and what `fully_shard` makes of it."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.plugins.precision.base import Precision
from trainyard.plugins.precision.mixed import MixedPrecision

_log = logging.getLogger("trainyard")

SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2", "NO_SHARD")
_MEANINGLESS = {
    "use_orig_params", "limit_all_gathers", "forward_prefetch", "backward_prefetch", "sync_module_states",
    "param_init_fn",
}  # fmt: skip
"""Arguments of the FullyShardedDataParallel that Lightning uses, whose subject `fully_shard` settles itself."""
_BASE = {
    "timeout", "process_group_backend", "start_method", "accelerator", "precision_plugin", "parallel_devices",
    "cluster_environment", "checkpoint_io",
}  # fmt: skip


def of_parallel(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What ParallelStrategy takes. Raises MisconfigurationException for what nobody knows."""
    for name in kwargs:
        if name not in _BASE | _MEANINGLESS:
            near = difflib.get_close_matches(name, sorted(_BASE | _MEANINGLESS), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise MisconfigurationException(f"{name}: FSDPStrategy does not take it{hint}")
    return {name: value for name, value in kwargs.items() if name in _BASE}


def sharding(given: Any, device_mesh: Any) -> str:
    """A name, or a member of torch.distributed.fsdp.ShardingStrategy. Raises MisconfigurationException."""
    name = str(getattr(given, "name", given)).upper()
    if name not in SHARDING:
        raise MisconfigurationException(f"sharding_strategy: {given!r} is none of {', '.join(SHARDING)}")
    if isinstance(device_mesh, tuple) and "HYBRID" not in name:
        raise MisconfigurationException(
            f"device_mesh: (replicas, shards) has a meaning with sharding_strategy='HYBRID_SHARD' only, not with {name!r}"
        )
    return name


def state_dict_type(given: str) -> str:
    """Raises MisconfigurationException."""
    if given not in ("full", "sharded"):
        raise MisconfigurationException(f"state_dict_type: {given!r} is neither 'full' nor 'sharded'")
    if given == "sharded":
        _log.warning(
            "state_dict_type='sharded': checkpoint files are whole all the same, gathered parameter by parameter and written "
            "by rank 0, so that any number of processes can load them"
        )
    return given


def precision_policy(given: Any, precision: Precision) -> Any:
    """A MixedPrecisionPolicy: `given`, which may be FullyShardedDataParallel's MixedPrecision, or that of `precision`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if isinstance(given, MixedPrecisionPolicy):
        return given
    if given is not None:
        return MixedPrecisionPolicy(
            param_dtype=getattr(given, "param_dtype", None), reduce_dtype=getattr(given, "reduce_dtype", None),
            cast_forward_inputs=bool(getattr(given, "cast_forward_inputs", True)),
        )  # fmt: skip
    if isinstance(precision, MixedPrecision):
        # Autocast decides about inputs: a batch may hold targets that must keep their digits.
        return MixedPrecisionPolicy(
            param_dtype=precision.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    return MixedPrecisionPolicy()
