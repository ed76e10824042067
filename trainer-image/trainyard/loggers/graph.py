"""The module's graph for loggers that draw it, without a trace in the training that follows."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

_log = logging.getLogger("trainyard")


def example_input(model: Any, given: Any, user: str) -> Any:
    """`given`, else `model.example_input_array`, through the transfer hooks; None, with a warning, if there is none."""
    sample = getattr(model, "example_input_array", None) if given is None else given
    if sample is None:
        _log.warning("%s: no graph without an input: set example_input_array in the module", user)
        return None
    if not hasattr(model, "transfer_batch_to_device"):
        return sample
    sample = model.on_before_batch_transfer(sample, 0)
    sample = model.transfer_batch_to_device(sample, model.device, 0)
    return model.on_after_batch_transfer(sample, 0)


@contextlib.contextmanager
def quiet_trace(model: Any, sample: Any) -> Iterator[tuple[Any, Any]]:
    """(module, its inputs) for torch.jit.trace. In evaluation mode, without gradients, and with the random generators
    put back: tracing runs the forward several times, and neither running statistics nor a resume may see that."""
    import torch

    from trainyard.reproducibility import isolate_rng

    modes = [(part, part.training) for part in model.modules()]
    traced, args = model, sample
    if isinstance(sample, Mapping):
        traced, args = _ByName(model, list(sample)), tuple(sample.values())
    elif not isinstance(sample, tuple):
        args = (sample,)
    try:
        model.eval()
        with isolate_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's about itself: TensorBoard's writer knows no other
            yield traced, args
    finally:
        for part, training in modes:
            part.training = training


def _ByName(model: Any, names: list[str]) -> Any:
    import torch

    class ByName(torch.nn.Module):
        """Positional inputs, as the tracer has it, for a forward that takes them by name."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> Any:
            return self.model(**dict(zip(names, values, strict=True)))

    return ByName()
