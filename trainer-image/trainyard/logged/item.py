"""What has been logged under one key since the epoch began."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

import torch

from trainyard.errors import MisconfigurationException
from trainyard.logged.options import Options
from trainyard.logged.torchmetrics import is_metric

_CHUNK = 256
"""Values that are kept before they are added up in one go: an addition a step would cost more than all else here."""


class Item:
    """Values stay where they are, on their device, until a flush wants numbers."""

    __slots__ = (
        "_total",
        "_values",
        "_weight",
        "_weights",
        "args",
        "fresh",
        "metric",
        "options",
        "published",
        "value",
    )

    def __init__(self, options: Options, args: Any = None, metric: Any = None) -> None:
        self.options = options
        self.args = args
        """Of `self.log`, as they were given."""
        self.metric = metric
        self.value: Any = None
        """The newest one: a 0-dimensional tensor or a number."""
        self.fresh = True
        """Logged since the last reduction at an epoch's end."""
        self.published = False
        """`value` went out with a flush."""
        self._values: list[Any] = []
        self._weights: list[float] = []
        self._total: torch.Tensor | None = None
        self._weight: float = 0

    def update(self, name: str, value: Any, weight: float) -> None:
        """`weight`: the samples that a mean value stands for; 0: it does not count. Raises ValueError for no scalar."""
        if isinstance(value, torch.Tensor):
            if value.ndim:
                value = _scalar(name, value)
            # A copy: what is logged is the value of now, whatever is done to the tensor in place afterwards.
            value = value.clone() if self.options.enable_graph else value.detach().clone()
            if not value.is_floating_point():
                value = value.to(wide(value.device))
        elif self.metric is not None:
            self.fresh, self.published = True, False
            return
        elif not isinstance(value, float | int):
            value = _number(name, value)
        self.value, self.fresh, self.published = value, True, False
        if weight and self.options.on_epoch:
            self._values.append(value)
            self._weights.append(weight)
            if len(self._values) >= _CHUNK:
                self._fold()

    def step_value(self, device: torch.device) -> torch.Tensor | None:
        """0-dimensional and of floating point; None when a metric has been updated without its forward."""
        value = self.value
        if self.metric is not None:
            value = getattr(self.metric, "_forward_cache", None)
            value = self.metric.compute() if value is None else value
        return None if value is None else _as_tensor(value, device)

    def sums(self, device: torch.device) -> tuple[torch.Tensor | None, float]:
        """The sum (weighted for a mean), minimum or maximum, in double precision, and the sum of the weights."""
        self._fold(device)
        return self._total, self._weight

    def _fold(self, device: torch.device | None = None) -> None:
        if not self._values:
            return
        values = stack(self._values, device)
        if self.options.reduce == "mean":
            part = (values * torch.tensor(self._weights, dtype=values.dtype, device=values.device)).sum()
        else:
            part = getattr(values, {"sum": "sum", "min": "amin", "max": "amax"}[self.options.reduce])()
        if self._total is None:
            self._total = part
        elif self.options.reduce in ("mean", "sum"):
            self._total = self._total.to(part.device) + part
        else:
            better = torch.minimum if self.options.reduce == "min" else torch.maximum
            self._total = better(self._total.to(part.device), part)
        self._weight += sum(self._weights)
        self._values, self._weights = [], []

    def state_dict(self) -> dict[str, Any]:
        """Not added up any further than it is: a resumed run must add in the same order as an unbroken one."""
        options = asdict(self.options)
        del options["group"]
        return {
            "options": options,
            "value": None if self.value is None else stack([self.value])[0],
            "values": stack(self._values) if self._values else None,
            "weights": list(self._weights), "total": self._total, "weight": self._weight,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Item:
        item = cls(Options(**state["options"]))
        if state["value"] is not None:
            item.value = state["value"].to(device)
        if state["values"] is not None:
            item._values = list(state["values"].to(device).unbind())
        item._weights, item._weight = list(state["weights"]), state["weight"]
        item._total = None if state["total"] is None else state["total"].to(device)
        return item


def wide(device: torch.device) -> torch.dtype:
    """In which sums are kept."""
    return torch.float32 if device.type == "mps" else torch.float64


def stack(values: list[Any], device: torch.device | None = None) -> torch.Tensor:
    """(n,), in double precision, of numbers and 0-dimensional tensors."""
    if device is None:
        device = next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))
    if not any(isinstance(v, torch.Tensor) for v in values):
        return torch.tensor(values, dtype=wide(device), device=device)
    with contextlib.suppress(TypeError, RuntimeError):  # numbers among them, or several devices
        return torch.stack(values).detach().to(device, wide(device))
    return torch.stack([_as_tensor(v, device).detach().to(wide(device)) for v in values])


def _as_tensor(value: Any, device: torch.device) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        # A kernel: copying a number from the host would wait for the device.
        return torch.full((), float(value), dtype=torch.get_default_dtype(), device=device)
    return value if value.is_floating_point() else value.float()


def _scalar(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.numel() != 1:
        raise ValueError(f"self.log({name!r}): a tensor of shape {tuple(value.shape)} is no scalar")
    return value.reshape(())


def _number(name: str, value: Any) -> float:
    if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1:
        return float(value.item())
    if is_metric(value):
        raise MisconfigurationException(
            f"self.log({name!r}): this {type(value).__name__} is another one than at the first call with this key"
        )
    raise ValueError(f"self.log({name!r}): a {type(value).__name__} is no number or one-element tensor")
