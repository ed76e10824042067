"""What gradients are like."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def grad_norm(
    module: torch.nn.Module, norm_type: float | int | str, group_separator: str = "/"
) -> dict[str, torch.Tensor]:
    """{"grad_2.0_norm/<parameter>": its gradient's p-norm, ..., "grad_2.0_norm_total": that of all together}: scalars on
    the parameters' device, in log_dict's format. Parameters without a gradient are left out; with none at all it is empty.

    `norm_type` is p, also "inf". Raises ValueError if it is not positive.
    """
    import torch

    p = float(norm_type)
    if not p > 0:
        raise ValueError(f"norm_type: {norm_type!r} is not positive, and not 'inf'")
    prefix = f"grad_{p}_norm"
    gradients = {
        name: parameter.grad.detach()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if not gradients:
        return {}
    norms = torch._foreach_norm(list(gradients.values()), p)
    # The norm of the parts' norms is that of the whole.
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), p)
    named = {f"{prefix}{group_separator}{name}": n for name, n in zip(gradients, norms, strict=True)}
    return {**named, f"{prefix}_total": total}
