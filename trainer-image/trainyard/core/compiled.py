"""Modules that were given to torch.compile before they are given to a Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule

_STEPS = ("training_step", "validation_step", "test_step", "predict_step", "forward")


def unwrap(model: Any) -> LightningModule:
    """The module itself; of `torch.compile(module)`, with its steps compiled and what they log outside of the graph.

    Raises MisconfigurationException for what is no LightningModule.
    """
    import torch

    from trainyard.core.module import LightningModule

    if isinstance(model, LightningModule):
        return model
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, LightningModule):
        for name in _STEPS:
            method = getattr(inner, name)
            if "_trainyard_compiled" not in vars(method):
                compiled = model.dynamo_ctx(method)
                compiled._trainyard_compiled = True
                # Into __dict__: nn.Module would do the same, after looking for parameters.
                inner.__dict__[name] = compiled
        return inner
    kind = type(model).__name__
    extra = (
        " Give the LightningModule, not its compiled or wrapped part"
        if isinstance(model, torch.nn.Module)
        else ""
    )
    raise MisconfigurationException(f"model: a {kind} is no LightningModule.{extra}")
